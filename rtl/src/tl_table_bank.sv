// SPDX-License-Identifier: Apache-2.0
// The T tables of one lane, in distributed RAM with a registered read: all are written together and each is read at its
// own index. Codes that no group of ternary digits has read as zero, so that a damaged weight changes a sum by a known
// amount instead of by what was last written.
`default_nettype none

module tl_table_bank #(
    parameter int unsigned T = 28,
    parameter int unsigned IndexBits = 5,
    parameter int unsigned EntryBits = 10,
    parameter int unsigned Banks = 1,  // sets of tables: 2 let one fill while the other is read
    localparam int unsigned BankBits = Banks > 1 ? $clog2(Banks) : 1
) (
    input  wire logic                   clk_i,
    input  wire logic                   write_i,
    input  wire logic [   BankBits-1:0] write_bank_i,
    input  wire logic [  IndexBits-1:0] write_index_i,
    input  wire logic [T*EntryBits-1:0] write_entries_i,
    input  wire logic [   BankBits-1:0] read_bank_i,
    input  wire logic [T*IndexBits-1:0] read_indices_i,
    output logic      [T*EntryBits-1:0] entries_o
);

  localparam int unsigned Rows = Banks << IndexBits;
  localparam int unsigned RowBits = $clog2(Rows);

  logic [RowBits-1:0] write_row;
  assign write_row = RowBits'({write_bank_i, write_index_i});

  for (genvar t = 0; t < T; t++) begin : gen_table
    (* ram_style = "distributed" *)
    logic [EntryBits-1:0] store[Rows];
    logic [EntryBits-1:0] entry_q;
    logic [RowBits-1:0] read_row;

    assign read_row = RowBits'({read_bank_i, read_indices_i[t*IndexBits+:IndexBits]});

    initial for (int unsigned row = 0; row < Rows; row++) store[row] = '0;

    always_ff @(posedge clk_i) begin
      if (write_i) store[write_row] <= write_entries_i[t*EntryBits+:EntryBits];
      entry_q <= store[read_row];
    end
    assign entries_o[t*EntryBits+:EntryBits] = entry_q;
  end

endmodule

`default_nettype wire
