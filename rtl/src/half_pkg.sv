// SPDX-License-Identifier: Apache-2.0
// float16 as integers: a finite value is mantissa * 2^exponent with an 11-bit mantissa. A NaN reads as zero, an infinity as
// the largest finite value of its sign. docs/reference/accelerator-contract.md is the specification.
`default_nettype none

package half_pkg;

  localparam int MinExponent = -24;
  localparam logic [14:0] MaxBits = 15'h7bff;

  function automatic logic nonfinite(input logic [14:0] magnitude);
    nonfinite = magnitude[14:10] == 5'd31;
  endfunction

  function automatic logic [14:0] finite(input logic [14:0] magnitude);
    finite = magnitude;
    if (magnitude[14:10] == 5'd31) finite = magnitude[9:0] == '0 ? MaxBits : '0;
  endfunction

  // of a finite magnitude
  function automatic logic [10:0] mantissa(input logic [14:0] magnitude);
    mantissa = {magnitude[14:10] != '0, magnitude[9:0]};
  endfunction

  function automatic logic signed [5:0] exponent(input logic [14:0] magnitude);
    exponent = signed'({1'b0, magnitude[14:10] == '0 ? 5'd1 : magnitude[14:10]}) - 6'sd25;
  endfunction

endpackage

`default_nettype wire
