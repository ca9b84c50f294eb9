// SPDX-License-Identifier: Apache-2.0
// What a descriptor says once it is taken apart, checked and completed: the settings of a linear or of an attention.
`default_nettype none

package run_pkg;

  localparam int unsigned AddrBits = 40;

  typedef logic [AddrBits-1:0] address_t;

  // Opcodes, flags and buffers: tilewright.edge.program.
  localparam logic [31:0] OpLinear = 32'd1;
  localparam logic [31:0] OpAttend = 32'd2;
  localparam logic [31:0] OpEnd = 32'd3;
  localparam logic [31:0] BufferKeys = 32'd6;
  localparam logic [31:0] BufferValues = 32'd7;

  typedef struct packed {
    logic               attend;
    logic               enter;
    logic               norm;
    logic [2:0]         mode;
    logic [14:0]        inputs;
    logic [15:0]        in_beats;      // of Lanes values
    logic [15:0]        outputs;
    logic [15:0]        out_beats;
    logic [15:0]        blocks;        // of T * G inputs
    logic [15:0]        sweep_beats;   // of Q outputs
    logic [15:0]        sweep_tail;    // outputs of the last of them
    logic [23:0]        vectors;
    logic [23:0]        weight_beats;
    address_t           weights;
    logic [16:0]        mantissa;
    logic signed [7:0]  exponent;
    logic [46:0]        eps;
    logic [7:0]         heads;
    logic [7:0]         kv_heads;
    logic [7:0]         head_beats;
    logic [15:0]        kv_beats;      // of a row of keys
    logic [15:0]        rows;
    logic [12:0]        first;         // position of the first row
    address_t           source;
    address_t           side;
    address_t           side_stride;
    logic [15:0]        side_beats;
    address_t           target;
    address_t           target_stride; // two's complement: towards lower addresses in a cache
    address_t           cache;         // offset of the newest row in the layer's cache
  } run_t;

endpackage

`default_nettype wire
