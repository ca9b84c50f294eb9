// SPDX-License-Identifier: Apache-2.0
// The accelerator's registers behind AXI4-Lite, and its counters. 32-bit words; of a 64-bit register the low word is at its
// offset, the high word at the next. What is not listed reads 0 and is not written; every answer is OKAY.
//
// 0x000 CONTROL  w: bit 0 start; r: bit 0 busy, bit 1 done (cleared by start)
// 0x004 STATUS   sticky bits; write ones to clear
// 0x008 ID "TWA1"   0x00C BUILD G | T << 4 | Q << 12 | P << 20 | Lanes << 24   0x010 ROWS_MAX
// 0x018 PROGRAM (64)   0x020 TOKENS   0x024 FIRST   0x028 CAPACITY
// 0x040 + 8 b: base of buffer b = 0 .. 7 (64)   0x080 WEIGHTS (64)   0x088 ANGLES (64)
// 0x100 CYCLES   0x108 LOAD   0x110 ENTER   0x118 SWEEP   0x120 ATTEND   0x128 WEIGHT_BEATS   0x130 KEY_ROWS
// 0x138 VALUE_ROWS   0x140 DESCRIPTORS: 64 bits each, of the run that is on or was last; to be read when it is done
//
// A start, and a write to anything but CONTROL and STATUS, is ignored while busy. Bits of an address past AddrBits read 0.
//
// A start gives unit_reset_o for a cycle, which clears the units' sticky bits, and start_o in the cycle after it. busy_o is
// high from unit_reset_o until done_i. A status bit is set by a rising edge, so that a unit's sticky bit, once it has been
// cleared here, stays cleared.
`default_nettype none

module axi_lite_registers #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned P = 4,
    parameter int unsigned Lanes = 16,
    parameter int unsigned RowsMax = 64,
    parameter int unsigned AddrBits = 40,
    localparam int unsigned StatusBits = 10
) (
    input  wire logic                  clk_i,
    input  wire logic                  rst_i,
    // AXI4-Lite
    input  wire logic [          11:0] s_axil_awaddr,
    input  wire logic                  s_axil_awvalid,
    output logic                       s_axil_awready,
    input  wire logic [          31:0] s_axil_wdata,
    input  wire logic [           3:0] s_axil_wstrb,
    input  wire logic                  s_axil_wvalid,
    output logic                       s_axil_wready,
    output logic      [           1:0] s_axil_bresp,
    output logic                       s_axil_bvalid,
    input  wire logic                  s_axil_bready,
    input  wire logic [          11:0] s_axil_araddr,
    input  wire logic                  s_axil_arvalid,
    output logic                       s_axil_arready,
    output logic      [          31:0] s_axil_rdata,
    output logic      [           1:0] s_axil_rresp,
    output logic                       s_axil_rvalid,
    input  wire logic                  s_axil_rready,
    // a run
    output logic                       unit_reset_o,
    output logic                       start_o,
    input  wire logic                  done_i,  // pulse
    output logic                       busy_o,
    output logic                       done_o,  // level, for an interrupt
    input  wire logic [StatusBits-1:0] status_i,  // in the contract's order; levels
    // counted while busy: cycles of LOAD, ENTER, SWEEP, ATTEND; WEIGHT_BEATS, KEY_ROWS, VALUE_ROWS, DESCRIPTORS
    input  wire logic [           3:0] phase_i,
    input  wire logic [           3:0] event_i,
    // settings, which do not change while busy
    output logic      [  AddrBits-1:0] program_o,
    output logic      [          31:0] tokens_o,
    output logic      [          31:0] first_o,
    output logic      [          31:0] capacity_o,
    output logic      [8*AddrBits-1:0] base_o,  // of buffer b at b * AddrBits
    output logic      [  AddrBits-1:0] weights_o,
    output logic      [  AddrBits-1:0] angles_o
);

  localparam int unsigned Control = 0, StatusWord = 1, Ident = 2, Build = 3, Rows = 4;  // words of 32 bits
  localparam int unsigned Program = 6, Tokens = 8, First = 9, Capacity = 10, Bases = 16, Weights = 32, Angles = 34;
  localparam int unsigned Settings = 36;  // words up to the last setting
  localparam int unsigned CounterWord = 64, Counters = 9;
  localparam logic [31:0] BuildValue = Lanes << 24 | P << 20 | Q << 12 | T << 4 | G;
  localparam logic [31:0] HighMask = 32'((64'd1 << (AddrBits - 32)) - 64'd1);

  if (AddrBits < 33 || AddrBits > 64) begin : gen_illegal_address
    $error("axi_lite_registers: addresses of %0d bits; 33 to 64 are needed", AddrBits);
  end
  if (G > 15 || T > 255 || Q > 255 || P > 15 || Lanes > 255) begin : gen_illegal_build
    $error("axi_lite_registers: G %0d, T %0d, Q %0d, P %0d, Lanes %0d do not fit the fields of BUILD", G, T, Q, P, Lanes);
  end

  // Bits of a word that hold what is written.
  function automatic logic [31:0] writable(input int unsigned word);
    writable = '0;
    if (word == Tokens || word == First || word == Capacity) writable = '1;
    if (word == Program || word >= Bases) writable = '1;
    if (word == Program + 1 || (word >= Bases && word % 2 == 1)) writable = HighMask;
  endfunction

  // --- writes: address and data come in any order, and wait for each other
  logic address_held_q, data_held_q, write;
  logic [9:0] write_word_q;
  logic [31:0] data_q, enabled;
  logic [3:0] strobe_q;

  assign s_axil_awready = !address_held_q;
  assign s_axil_wready  = !data_held_q;
  assign s_axil_bresp   = 2'b00;
  assign write          = address_held_q && data_held_q && (!s_axil_bvalid || s_axil_bready);
  assign enabled        = {{8{strobe_q[3]}}, {8{strobe_q[2]}}, {8{strobe_q[1]}}, {8{strobe_q[0]}}};

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      address_held_q <= 1'b0;
      data_held_q    <= 1'b0;
      s_axil_bvalid  <= 1'b0;
    end else begin
      if (s_axil_awvalid) address_held_q <= 1'b1;
      if (s_axil_wvalid) data_held_q <= 1'b1;
      if (s_axil_bready) s_axil_bvalid <= 1'b0;
      if (write) begin
        address_held_q <= 1'b0;
        data_held_q    <= 1'b0;
        s_axil_bvalid  <= 1'b1;
      end
    end
  end

  always_ff @(posedge clk_i) begin
    if (s_axil_awready) write_word_q <= s_axil_awaddr[11:2];
    if (s_axil_wready) begin
      data_q   <= s_axil_wdata;
      strobe_q <= s_axil_wstrb;
    end
  end

  // --- a run
  logic begin_run;
  assign begin_run = write && write_word_q == 10'(Control) && data_q[0] && enabled[0] && !busy_o;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      busy_o       <= 1'b0;
      done_o       <= 1'b0;
      unit_reset_o <= 1'b0;
      start_o      <= 1'b0;
    end else begin
      unit_reset_o <= begin_run;
      start_o      <= unit_reset_o;
      if (begin_run) begin
        busy_o <= 1'b1;
        done_o <= 1'b0;
      end else if (done_i && busy_o) begin
        busy_o <= 1'b0;
        done_o <= 1'b1;
      end
    end
  end

  logic [StatusBits-1:0] status_q, status_before_q, cleared;
  assign cleared = write && write_word_q == 10'(StatusWord) ? StatusBits'(data_q & enabled) : '0;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      status_q        <= '0;
      status_before_q <= '0;
    end else begin
      status_q        <= (status_q & ~cleared) | (status_i & ~status_before_q);
      status_before_q <= status_i;
    end
  end

  // --- settings
  logic [Settings-1:0][31:0] settings;
  for (genvar word = 0; word < Settings; word++) begin : gen_setting
    localparam logic [31:0] Mask = writable(word);
    if (Mask == '0) begin : gen_none
      assign settings[word] = '0;
    end else begin : gen_word
      logic [31:0] value_q;
      assign settings[word] = value_q;
      always_ff @(posedge clk_i) begin
        if (rst_i) value_q <= '0;
        else if (write && !busy_o && write_word_q == 10'(word)) begin
          value_q <= ((data_q & enabled) | (value_q & ~enabled)) & Mask;
        end
      end
    end
  end

  assign program_o  = AddrBits'({settings[Program+1], settings[Program]});
  assign weights_o  = AddrBits'({settings[Weights+1], settings[Weights]});
  assign angles_o   = AddrBits'({settings[Angles+1], settings[Angles]});
  assign tokens_o   = settings[Tokens];
  assign first_o    = settings[First];
  assign capacity_o = settings[Capacity];
  for (genvar buffer = 0; buffer < 8; buffer++) begin : gen_base
    assign base_o[buffer*AddrBits+:AddrBits] = AddrBits'({settings[Bases+2*buffer+1], settings[Bases+2*buffer]});
  end

  // --- counters
  logic [Counters-1:0][63:0] counts;
  logic [Counters-1:0] counted;
  assign counted = {event_i, phase_i, 1'b1};
  for (genvar counter = 0; counter < Counters; counter++) begin : gen_counter
    logic [63:0] count_q;
    assign counts[counter] = count_q;
    always_ff @(posedge clk_i) begin
      if (rst_i || begin_run) count_q <= '0;
      else if (busy_o && counted[counter]) count_q <= count_q + 64'd1;
    end
  end

  // --- reads
  logic read_held_q;
  logic [9:0] read_word_q;
  logic [31:0] value;

  assign s_axil_arready = !read_held_q;
  assign s_axil_rresp   = 2'b00;

  always_comb begin
    value = '0;
    for (int unsigned word = Program; word < Settings; word++) begin
      if (read_word_q == 10'(word)) value = settings[word];
    end
    for (int unsigned counter = 0; counter < Counters; counter++) begin
      if (read_word_q == 10'(CounterWord + 2 * counter)) value = counts[counter][31:0];
      if (read_word_q == 10'(CounterWord + 2 * counter + 1)) value = counts[counter][63:32];
    end
    case (read_word_q)
      10'(Control): value = {30'd0, done_o, busy_o};
      10'(StatusWord): value = 32'(status_q);
      10'(Ident): value = 32'h5457_4131;
      10'(Build): value = BuildValue;
      10'(Rows): value = 32'(RowsMax);
      default: ;
    endcase
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      read_held_q   <= 1'b0;
      s_axil_rvalid <= 1'b0;
    end else begin
      if (s_axil_arvalid) read_held_q <= 1'b1;
      if (s_axil_rready) s_axil_rvalid <= 1'b0;
      if (read_held_q && (!s_axil_rvalid || s_axil_rready)) begin
        read_held_q   <= 1'b0;
        s_axil_rvalid <= 1'b1;
      end
    end
    if (s_axil_arready) read_word_q <= s_axil_araddr[11:2];
    if (!s_axil_rvalid || s_axil_rready) s_axil_rdata <= value;
  end

  logic [3:0] unused_bytes;
  assign unused_bytes = {s_axil_awaddr[1:0], s_axil_araddr[1:0]};

endmodule

`default_nettype wire
