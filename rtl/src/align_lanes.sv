// SPDX-License-Identifier: Apache-2.0
// A beat of float16 as integers of Width bits and a sign at one exponent: (mantissa << (Width - 11)) >> (top - exponent).
// One register.
`default_nettype none

module align_lanes #(
    parameter int unsigned Lanes = 16,
    parameter int unsigned Width = 17
) (
    input  wire logic                         clk_i,
    input  wire logic [         Lanes*16-1:0] data_i,
    input  wire logic signed [           5:0] top_i,
    output logic      [Lanes*(Width+1)-1:0] aligned_o
);

  for (genvar lane = 0; lane < Lanes; lane++) begin : gen_lane
    logic [14:0] value;
    logic [Width-1:0] magnitude;
    logic [5:0] distance;

    assign value     = half_pkg::finite(data_i[lane*16+:15]);
    assign distance  = unsigned'(top_i - half_pkg::exponent(value));
    assign magnitude = {half_pkg::mantissa(value), {(Width - 11) {1'b0}}} >> distance;

    always_ff @(posedge clk_i) begin
      aligned_o[lane*(Width+1)+:Width+1] <= data_i[lane*16+15] ? -((Width + 1)'(magnitude)) : (Width + 1)'(magnitude);
    end
  end

endmodule

`default_nettype wire
