// SPDX-License-Identifier: Apache-2.0
// Places of a stream's beats in a store of rows of heads: which row, head and beat each is. Rows go round in Rows places; room_i
// says whether the next one may be written.
`default_nettype none

module row_loader #(
    parameter int unsigned Rows = 4,
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned BeatsMax = 96,
    localparam int unsigned RowBits = Rows > 1 ? $clog2(Rows) : 1,
    localparam int unsigned HeadBits = HeadsMax > 1 ? $clog2(HeadsMax) : 1,
    localparam int unsigned BeatBits = BeatsMax > 1 ? $clog2(BeatsMax) : 1
) (
    input  wire logic                clk_i,
    input  wire logic                rst_i,
    input  wire logic                start_i,
    input  wire logic [        12:0] rows_i,
    input  wire logic [         7:0] heads_i,
    input  wire logic [         7:0] head_beats_i,
    input  wire logic                room_i,
    input  wire logic                valid_i,
    output logic                     ready_o,
    output logic                     write_o,
    output logic      [ RowBits-1:0] row_o,
    output logic      [HeadBits-1:0] head_o,
    output logic      [BeatBits-1:0] beat_o,
    output logic                     first_o,
    output logic      [        12:0] loaded_o  // rows that are complete
);

  logic [12:0] left_q;
  logic [7:0] head_q, head_beat_q;
  logic last_beat, last_head;

  assign ready_o   = left_q != '0 && room_i;
  assign write_o   = valid_i && ready_o;
  assign head_o    = HeadBits'(head_q);
  assign first_o   = head_beat_q == '0;
  assign last_beat = head_beat_q + 8'd1 == head_beats_i;
  assign last_head = head_q + 8'd1 == heads_i;

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      left_q   <= '0;
      loaded_o <= '0;
    end else if (start_i) begin
      left_q   <= rows_i;
      loaded_o <= '0;
    end else if (write_o && last_beat && last_head) begin
      left_q   <= left_q - 13'd1;
      loaded_o <= loaded_o + 13'd1;
    end
  end

  always_ff @(posedge clk_i) begin
    if (start_i) begin
      row_o       <= '0;
      head_q      <= '0;
      head_beat_q <= '0;
      beat_o      <= '0;
    end else if (write_o) begin
      beat_o      <= beat_o + 1'b1;
      head_beat_q <= last_beat ? '0 : head_beat_q + 8'd1;
      if (last_beat) head_q <= last_head ? '0 : head_q + 8'd1;
      if (last_beat && last_head) begin
        beat_o <= '0;
        row_o  <= 32'(row_o) == Rows - 1 ? '0 : row_o + 1'b1;
      end
    end
  end

endmodule

`default_nettype wire
