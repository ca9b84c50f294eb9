// SPDX-License-Identifier: Apache-2.0
// Stream of In lanes a beat to Out lanes a beat, any two numbers. A frame's last beat may hold fewer lanes than it could:
// the output's last beat is filled up with zero lanes. A frame ends before the next begins.
//
// Full throughput within a frame: a beat enters while one leaves and what is left is less than another, so the store holds
// Out + min(In, Out) - 1 lanes before a beat enters. Within a frame every count is a multiple of gcd(In, Out).
`default_nettype none

module gearbox #(
    parameter int unsigned Width = 8,  // bits of a lane
    parameter int unsigned In = 16,
    parameter int unsigned Out = 84,
    localparam int unsigned InBits = $clog2(In + 1)
) (
    input  wire logic                 clk_i,
    input  wire logic                 rst_i,
    input  wire logic                 in_valid_i,
    output logic                      in_ready_o,
    input  wire logic [ In*Width-1:0] in_data_i,
    input  wire logic [   InBits-1:0] in_lanes_i,  // of this beat, 1 to In; fewer than In only in a frame's last
    input  wire logic                 in_last_i,
    output logic                      out_valid_o,
    input  wire logic                 out_ready_i,
    output logic      [Out*Width-1:0] out_data_o,
    output logic                      out_last_o
);

  // Euclid's algorithm, with what every tool's parser takes.
  function automatic integer gcd(input integer a, input integer b);
    integer rest;
    while (b != 0) begin
      rest = a % b;
      a    = b;
      b    = rest;
    end
    gcd = a;
  endfunction

  localparam int unsigned Step = gcd(int'(In), int'(Out));
  localparam int unsigned Before = Out + (In < Out ? In : Out) - 1;
  localparam int unsigned Capacity = Before + In;
  localparam int unsigned CountBits = $clog2(Capacity + 1);

  if (In < 1 || Out < 1) begin : gen_illegal_lanes
    $error("gearbox: %0d lanes in and %0d lanes out; at least one of each is needed", In, Out);
  end

  logic [Capacity*Width-1:0] store_q, kept, placed;
  logic [CountBits-1:0] count_q, left;
  logic ending_q, push, pop;

  assign in_ready_o  = !ending_q && count_q <= CountBits'(Before);
  assign out_valid_o = count_q >= CountBits'(Out) || (ending_q && count_q != '0);
  assign out_last_o  = ending_q && count_q <= CountBits'(Out);
  assign out_data_o  = store_q[Out*Width-1:0];
  assign push        = in_valid_i && in_ready_o;
  assign pop         = out_valid_o && out_ready_i;

  // Lanes past the count are always zero.
  logic [In*Width-1:0] lanes;
  for (genvar lane = 0; lane < In; lane++) begin : gen_lane
    assign lanes[lane*Width+:Width] = InBits'(lane) < in_lanes_i ? in_data_i[lane*Width+:Width] : '0;
  end

  always_comb begin
    kept = store_q;
    left = count_q;
    if (pop) begin
      kept = store_q >> (Out * Width);
      left = count_q > CountBits'(Out) ? count_q - CountBits'(Out) : '0;
    end
    placed = '0;
    for (int unsigned place = 0; place <= Before; place += Step) begin
      if (left == CountBits'(place)) placed = (Capacity * Width)'(lanes) << (place * Width);
    end
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) begin
      count_q  <= '0;
      ending_q <= 1'b0;
    end else begin
      count_q <= push ? left + CountBits'(in_lanes_i) : left;
      if (push && in_last_i) ending_q <= 1'b1;
      if (pop && out_last_o) ending_q <= 1'b0;
    end
  end

  always_ff @(posedge clk_i) begin
    if (rst_i) store_q <= '0;
    else store_q <= push ? kept | placed : kept;
  end

endmodule

`default_nettype wire
