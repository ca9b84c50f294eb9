// SPDX-License-Identifier: Apache-2.0
// Numbers of what can follow the dequantizer, in the order of FUSE_MODES of the contract.
`default_nettype none

package fuse_pkg;

  localparam logic [2:0] Bypass = 3'd0;
  localparam logic [2:0] Residual = 3'd1;
  localparam logic [2:0] Rope = 3'd2;
  localparam logic [2:0] Silu = 3'd3;
  localparam logic [2:0] SquaredRelu = 3'd4;

  // registers of fuse_pair
  localparam int unsigned Latency = 9;

endpackage

`default_nettype wire
