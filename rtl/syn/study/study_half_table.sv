// SPDX-License-Identifier: Apache-2.0
// Method 2 of the look-up: tables of half of the sums, since the other half is their negatives. An index is a sign and a
// magnitude, 0 to (3^G - 1) / 2, as many bits as method 3's; the entry read is negated by its sign, then added.
`default_nettype none

module study_half_table #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    localparam int unsigned IndexBits = $clog2((3 ** G + 1) / 2),
    localparam int unsigned EntryBits = $clog2(G * 128 + 1) + 1,
    localparam int unsigned Depth = $clog2(T)
) (
    input  wire logic                               clk_i,
    input  wire logic                               write_i,
    input  wire logic        [       IndexBits-1:0] write_index_i,
    input  wire logic        [     T*EntryBits-1:0] write_entries_i,
    input  wire logic        [T*(IndexBits+1)-1:0]  indices_i,
    output logic signed      [ EntryBits+Depth-1:0] sum_o
);

  logic [(1<<Depth)*EntryBits-1:0] terms;
  logic [T*IndexBits-1:0] magnitudes;
  logic [T*EntryBits-1:0] entries;
  logic [T-1:0] signs_q;

  for (genvar t = 0; t < T; t++) begin : gen_index
    assign magnitudes[t*IndexBits+:IndexBits] = indices_i[t*(IndexBits+1)+:IndexBits];
    always_ff @(posedge clk_i) signs_q[t] <= indices_i[t*(IndexBits+1)+IndexBits];
  end

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
      .read_indices_i (magnitudes),
      .entries_o      (entries)
  );

  always_comb begin
    terms = '0;
    for (int unsigned t = 0; t < T; t++) begin
      terms[t*EntryBits+:EntryBits] = signs_q[t] ? -entries[t*EntryBits+:EntryBits] : entries[t*EntryBits+:EntryBits];
    end
  end

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
