// SPDX-License-Identifier: Apache-2.0
// First-in first-out buffer in block RAM. A fetch takes two cycles to the output, so up to four beats beyond Depth are held.
`default_nettype none

module block_fifo #(
    parameter int unsigned Width = 8,
    parameter int unsigned Depth = 512,
    localparam int unsigned CountBits = $clog2(Depth + 1)
) (
    input  wire logic             clk_i,
    input  wire logic             rst_i,
    input  wire logic             valid_i,
    output logic                  ready_o,
    input  wire logic [Width-1:0] data_i,
    output logic                  valid_o,
    input  wire logic             ready_i,
    output logic      [Width-1:0] data_o
);

  localparam int unsigned PlaceBits = Depth > 1 ? $clog2(Depth) : 1;

  (* ram_style = "block" *)
  logic [Width-1:0] store[Depth];
  logic [PlaceBits-1:0] write_q, read_q;
  logic [CountBits-1:0] count_q;
  logic [2:0] room_q;  // places of the output's buffer that no beat has or is on its way to
  logic [Width-1:0] fetched_q;
  logic push, fetch, fetched_valid_q, buffer_ready;
  logic [2:0] unused_count;

  assign ready_o = count_q != CountBits'(Depth);
  assign push    = valid_i && ready_o;
  assign fetch   = count_q != '0 && room_q != '0;

  function automatic logic [PlaceBits-1:0] after(input logic [PlaceBits-1:0] place);
    after = 32'(place) == Depth - 1 ? '0 : place + 1'b1;
  endfunction

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      write_q         <= '0;
      read_q          <= '0;
      count_q         <= '0;
      room_q          <= 3'd4;
      fetched_valid_q <= 1'b0;
    end else begin
      if (push) write_q <= after(write_q);
      if (fetch) read_q <= after(read_q);
      count_q         <= count_q + CountBits'(push) - CountBits'(fetch);
      room_q          <= room_q - 3'(fetch) + 3'(valid_o && ready_i);
      fetched_valid_q <= fetch;
    end
  end

  always_ff @(posedge clk_i) begin
    if (push) store[write_q] <= data_i;
    fetched_q <= store[read_q];
  end

  fifo #(
      .Width(Width),
      .Depth(4)
  ) u_buffer (
      .clk_i,
      .rst_i,
      .valid_i(fetched_valid_q),
      .ready_o(buffer_ready),
      .data_i (fetched_q),
      .valid_o,
      .ready_i,
      .data_o,
      .count_o(unused_count)
  );

`ifdef VERILATOR
  always_ff @(posedge clk_i) begin
    if (!rst_i) begin
      assert (!fetched_valid_q || buffer_ready)
      else $error("block_fifo: a beat without a place");
    end
  end
`else
  wire logic unused_ready = &{1'b0, buffer_ready};
`endif

endmodule

`default_nettype wire
