// SPDX-License-Identifier: Apache-2.0
// Method 3 of the look-up, the one that tlmm_core has: one lane's T tables of all 3^G sums, read and added.
`default_nettype none

module study_full_table #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    localparam int unsigned IndexBits = $clog2(3 ** G),
    localparam int unsigned EntryBits = $clog2(G * 128 + 1) + 1,
    localparam int unsigned Depth = $clog2(T)
) (
    input  wire logic                              clk_i,
    input  wire logic                              write_i,
    input  wire logic        [      IndexBits-1:0] write_index_i,
    input  wire logic        [    T*EntryBits-1:0] write_entries_i,
    input  wire logic        [    T*IndexBits-1:0] indices_i,
    output logic signed      [EntryBits+Depth-1:0] sum_o
);

  logic [(1<<Depth)*EntryBits-1:0] terms;
  logic [T*EntryBits-1:0] entries;

  tl_table_bank #(
      .T(T),
      .IndexBits(IndexBits),
      .EntryBits(EntryBits)
  ) u_tables (
      .clk_i,
      .write_i,
      .write_bank_i   (1'b0),
      .write_index_i,
      .write_entries_i,
      .read_bank_i    (1'b0),
      .read_indices_i (indices_i),
      .entries_o      (entries)
  );

  assign terms = ((1 << Depth) * EntryBits)'(entries);

  adder_tree #(
      .Depth(Depth),
      .Width(EntryBits)
  ) u_tree (
      .clk_i,
      .terms_i(terms),
      .sum_o
  );

endmodule

`default_nettype wire
