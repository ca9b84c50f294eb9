// SPDX-License-Identifier: Apache-2.0
// Writes the lookup tables of one block of activations, one entry of all T tables a cycle (a distributed RAM has one write
// port): entry c of table t is sum over g of (digit_g(c) - 1) * a[t*G + g], digits in base 3, least significant first.
//
// Widths: |entry| <= G * 128, since an activation may be -128 and its negative is then 128.
`default_nettype none

module tl_precompute #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    localparam int unsigned Entries = 3 ** G,
    localparam int unsigned IndexBits = $clog2(Entries),
    localparam int unsigned EntryBits = $clog2(G * 128 + 1) + 1
) (
    input  wire logic                        clk_i,
    input  wire logic                        rst_i,
    // a block of T*G activations, each eight bits, the first in the lowest bits
    input  wire logic                        valid_i,
    output logic                             ready_o,
    input  wire logic [           T*G*8-1:0] block_i,
    // one entry of every table
    input  wire logic                        enable_i,  // the tables may be written
    output logic                             write_o,
    output logic      [       IndexBits-1:0] index_o,
    output logic      [     T*EntryBits-1:0] entries_o,
    output logic                             done_o     // with the last entry
);

  if (G < 1 || G > 5) begin : gen_illegal_g
    $error("tl_precompute: G %0d; 1 to 5 inputs a table are possible", G);
  end
  if (T < 1) begin : gen_illegal_t
    $error("tl_precompute: T %0d; at least one table is needed", T);
  end

  logic [IndexBits-1:0] index_q;
  logic [2*G-1:0] digits_q, digits_d;
  logic last;

  assign last    = index_q == IndexBits'(Entries - 1);
  assign write_o = valid_i && enable_i;
  assign done_o  = write_o && last;
  assign ready_o = enable_i && last;
  assign index_o = index_q;

  // Count in base 3 beside the binary index.
  always_comb begin
    logic carry;
    carry    = 1'b1;
    digits_d = digits_q;
    for (int unsigned g = 0; g < G; g++) begin
      if (carry) begin
        carry = digits_q[2*g+:2] == 2'd2;
        digits_d[2*g+:2] = carry ? 2'd0 : digits_q[2*g+:2] + 2'd1;
      end
    end
  end

  always_ff @(posedge clk_i) begin
    if (rst_i || done_o) begin
      index_q  <= '0;
      digits_q <= '0;
    end else if (write_o) begin
      index_q  <= index_q + 1'b1;
      digits_q <= digits_d;
    end
  end

  for (genvar t = 0; t < T; t++) begin : gen_entry
    logic signed [EntryBits-1:0] entry;
    always_comb begin
      entry = '0;
      for (int unsigned g = 0; g < G; g++) begin
        logic signed [EntryBits-1:0] a;
        a = EntryBits'(signed'(block_i[(t*G+g)*8+:8]));
        unique case (digits_q[2*g+:2])
          2'd0: entry -= a;
          2'd2: entry += a;
          default: ;
        endcase
      end
    end
    assign entries_o[t*EntryBits+:EntryBits] = entry;
  end

endmodule

`default_nettype wire
