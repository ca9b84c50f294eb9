// SPDX-License-Identifier: Apache-2.0
// Index vectors of one linear on chip. Vectors are numbered block by block, output by output; vector v lies in bank
// v mod (Q/2), word v div (Q/2). A bank is an UltraRAM of two ports: reading, its ports give two neighbouring words, so the
// banks together give the Q vectors of a beat every cycle; loading, one port writes the Vectors of a memory beat, rotated to
// their banks. Ports are shared, so loading and reading take turns: a read waits until a load has ended and the other way
// round.
`default_nettype none

module weight_buffer #(
    parameter int unsigned VectorBits = 140,
    parameter int unsigned Q = 16,  // even
    parameter int unsigned Vectors = 5,  // of a memory beat, at most Q/2
    parameter int unsigned Words = 12288,  // of a bank
    localparam int unsigned BanksN = Q / 2,
    localparam int unsigned VectorsMax = Words * BanksN,
    localparam int unsigned CountBits = $clog2(VectorsMax + 1),
    localparam int unsigned BeatsMax = Words / 2,
    localparam int unsigned BeatsBits = $clog2(BeatsMax + 1)
) (
    input  wire logic                           clk_i,
    input  wire logic                           rst_i,
    // load: how many vectors follow, from vector 0 on
    input  wire logic                           load_valid_i,
    output logic                                load_ready_o,
    input  wire logic [          CountBits-1:0] load_vectors_i,
    input  wire logic                           mem_valid_i,
    output logic                                mem_ready_o,
    input  wire logic [ Vectors*VectorBits-1:0] mem_data_i,
    // read: how many beats of Q vectors, from vector 0 on
    input  wire logic                           read_valid_i,
    output logic                                read_ready_o,
    input  wire logic [          BeatsBits-1:0] read_beats_i,
    output logic                                w_valid_o,
    input  wire logic                           w_ready_i,
    output logic      [       Q*VectorBits-1:0] w_data_o
);

  localparam int unsigned WordBits = $clog2(Words);
  localparam int unsigned BankBits = BanksN > 1 ? $clog2(BanksN) : 1;

  if (Q < 2 || Q % 2 != 0) begin : gen_illegal_q
    $error("weight_buffer: Q %0d; an even number of lanes is needed, two a bank", Q);
  end
  if (Vectors < 1 || Vectors > BanksN) begin : gen_illegal_vectors
    $error("weight_buffer: %0d vectors a beat; 1 to %0d banks can be written at a time", Vectors, BanksN);
  end
  if (Words < 2 || Words % 2 != 0) begin : gen_illegal_words
    $error("weight_buffer: %0d words; pairs of words are needed", Words);
  end

  // --- control
  logic [CountBits-1:0] load_left_q;
  logic [BeatsBits-1:0] read_left_q;
  logic loading, reading, write;

  assign loading      = load_left_q != '0;
  assign reading      = read_left_q != '0;
  assign load_ready_o = !loading && !reading;
  assign read_ready_o = !loading && !reading && !load_valid_i;
  assign mem_ready_o  = loading;
  assign write        = mem_valid_i && mem_ready_o;

  // --- place of the next vector: bank and word counted apart, so that BanksN need be no power of two
  logic [BankBits-1:0] bank_q;
  logic [WordBits-1:0] word_q;
  logic [WordBits-1:0] pair_q;
  logic advance, fetch;

  assign fetch = reading && advance;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      load_left_q <= '0;
      read_left_q <= '0;
    end else begin
      if (load_valid_i && load_ready_o) load_left_q <= load_vectors_i;
      if (write) begin
        load_left_q <= load_left_q > CountBits'(Vectors) ? load_left_q - CountBits'(Vectors) : '0;
      end
      if (read_valid_i && read_ready_o) read_left_q <= read_beats_i;
      if (fetch) read_left_q <= read_left_q - 1'b1;
    end
  end

  always_ff @(posedge clk_i) begin
    if (load_valid_i && load_ready_o) begin
      bank_q <= '0;
      word_q <= '0;
    end else if (write) begin
      if (32'(bank_q) + Vectors >= BanksN) begin
        bank_q <= BankBits'(32'(bank_q) + Vectors - BanksN);
        word_q <= word_q + 1'b1;
      end else begin
        bank_q <= bank_q + BankBits'(Vectors);
      end
    end
    if (read_valid_i && read_ready_o) pair_q <= '0;
    else if (fetch) pair_q <= pair_q + WordBits'(2);
  end

  // --- banks: two cycles of latency, the whole pipeline waits for the taker
  logic [1:0] valid_q;
  assign w_valid_o = valid_q[1];
  assign advance   = w_ready_i || !valid_q[1];

  always_ff @(posedge clk_i) begin
    if (rst_i) valid_q <= '0;
    else if (advance) valid_q <= {valid_q[0], reading};
  end

  for (genvar bank = 0; bank < BanksN; bank++) begin : gen_bank
    (* ram_style = "ultra" *)
    logic [VectorBits-1:0] store[Words];
    logic [VectorBits-1:0] low_q, high_q, low_q2, high_q2, vector;
    logic [WordBits-1:0] low_word, high_word;
    logic mine;
    int unsigned offset;

    // which vector of the beat is this bank's, if any
    always_comb begin
      offset = bank >= 32'(bank_q) ? bank - 32'(bank_q) : bank + BanksN - 32'(bank_q);
      mine   = write && offset < Vectors && CountBits'(offset) < load_left_q;
      vector = '0;
      for (int unsigned v = 0; v < Vectors; v++) begin
        if (offset == v) vector = mem_data_i[v*VectorBits+:VectorBits];
      end
      low_word  = pair_q;
      high_word = pair_q + 1'b1;
      if (loading) low_word = word_q + WordBits'(bank < 32'(bank_q));
    end

    always_ff @(posedge clk_i) begin
      if (mine) store[low_word] <= vector;
      else if (advance) low_q <= store[low_word];
      if (advance) begin
        high_q  <= store[high_word];
        low_q2  <= low_q;
        high_q2 <= high_q;
      end
    end

    assign w_data_o[bank*VectorBits+:VectorBits]          = low_q2;
    assign w_data_o[(BanksN+bank)*VectorBits+:VectorBits] = high_q2;
  end

endmodule

`default_nettype wire
