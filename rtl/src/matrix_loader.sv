// SPDX-License-Identifier: Apache-2.0
// Loads a matrix: its stream is read over three ports and taken apart into index vectors for the weight buffer and norm weights.
//
// A stream that is shorter or longer than the shape says, or that was read with an error, ends in failed_o; what is too much is
// dropped, and what the units then hold must be reset.
`default_nettype none

module matrix_loader
  import run_pkg::*;
#(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned Lanes = 16,
    localparam int unsigned DataBits = 16 * Lanes,
    localparam int unsigned VectorBits = T * $clog2(3 ** G),
    localparam int unsigned PerBeat = (768 - 16) / VectorBits,
    localparam int unsigned Vectors = PerBeat < Q / 2 ? PerBeat : Q / 2
) (
    input  wire logic                          clk_i,
    input  wire logic                          rst_i,
    input  wire logic                          active_i,  // from the start until done_o
    input  wire run_t                          run_i,  // steady from the cycle before
    output logic                               done_o,
    output logic                               failed_o,  // sticky; with done_o
    output logic                               bad_o,  // sticky: the stream is not what the shape needs
    output logic                               beat_o,  // has come, for one cycle
    output logic                               load_valid_o,  // to the weight buffer
    input  wire logic                          load_ready_i,
    output logic                               vec_valid_o,
    input  wire logic                          vec_ready_i,
    output logic      [Vectors*VectorBits-1:0] vec_data_o,
    output logic                               norm_valid_o,
    output logic      [                  15:0] norm_data_o,
    // sticky
    output logic                               bad_index_o,
    output logic                               bus_error_o,
    output logic      [          AddrBits-1:0] m_axi_w0_araddr,
    output logic      [                   7:0] m_axi_w0_arlen,
    output logic      [                   2:0] m_axi_w0_arsize,
    output logic      [                   1:0] m_axi_w0_arburst,
    output logic                               m_axi_w0_arvalid,
    input  wire logic                          m_axi_w0_arready,
    input  wire logic [          DataBits-1:0] m_axi_w0_rdata,
    input  wire logic [                   1:0] m_axi_w0_rresp,
    input  wire logic                          m_axi_w0_rlast,
    input  wire logic                          m_axi_w0_rvalid,
    output logic                               m_axi_w0_rready,
    output logic      [          AddrBits-1:0] m_axi_w1_araddr,
    output logic      [                   7:0] m_axi_w1_arlen,
    output logic      [                   2:0] m_axi_w1_arsize,
    output logic      [                   1:0] m_axi_w1_arburst,
    output logic                               m_axi_w1_arvalid,
    input  wire logic                          m_axi_w1_arready,
    input  wire logic [          DataBits-1:0] m_axi_w1_rdata,
    input  wire logic [                   1:0] m_axi_w1_rresp,
    input  wire logic                          m_axi_w1_rlast,
    input  wire logic                          m_axi_w1_rvalid,
    output logic                               m_axi_w1_rready,
    output logic      [          AddrBits-1:0] m_axi_w2_araddr,
    output logic      [                   7:0] m_axi_w2_arlen,
    output logic      [                   2:0] m_axi_w2_arsize,
    output logic      [                   1:0] m_axi_w2_arburst,
    output logic                               m_axi_w2_arvalid,
    input  wire logic                          m_axi_w2_arready,
    input  wire logic [          DataBits-1:0] m_axi_w2_rdata,
    input  wire logic [                   1:0] m_axi_w2_rresp,
    input  wire logic                          m_axi_w2_rlast,
    input  wire logic                          m_axi_w2_rvalid,
    output logic                               m_axi_w2_rready
);

  logic cmd_valid, cmd_ready, reader_valid, reader_ready, unpack_cmd_ready, unpack_ready, fits, bad_q;
  logic asked_q, unpack_asked_q, load_asked_q;
  logic [767:0] beat;
  logic [23:0] left_q;
  logic [3:0] settle_q;

  assign cmd_valid    = active_i && !asked_q;
  assign reader_ready = active_i && (unpack_ready || (unpack_asked_q && unpack_cmd_ready));
  assign beat_o       = reader_valid && reader_ready;
  assign load_valid_o = active_i && !load_asked_q;
  assign done_o       = active_i && asked_q && load_asked_q && left_q == '0 && settle_q == '0;
  assign fits         = unpack_cmd_ready && load_ready_i;
  assign bad_o        = bad_q || (done_o && !fits);
  assign failed_o     = bad_o || bus_error_o;

  always_ff @(posedge clk_i) begin
    if (rst_i) bad_q <= 1'b0;
    // More beats than the matrix has, or it still waits when all have come.
    else if ((beat_o && !unpack_ready) || (done_o && !fits)) bad_q <= 1'b1;

    if (!active_i) begin
      asked_q        <= 1'b0;
      unpack_asked_q <= 1'b0;
      load_asked_q   <= 1'b0;
      left_q         <= run_i.weight_beats;
    end else begin
      if (cmd_valid && cmd_ready) asked_q <= 1'b1;
      if (unpack_cmd_ready) unpack_asked_q <= 1'b1;
      if (load_ready_i) load_asked_q <= 1'b1;
      if (beat_o) left_q <= left_q - 24'd1;
    end
    // The last groups are on their way; a beat holds PerBeat vectors, so many groups at the most.
    if (left_q != '0 || vec_valid_o) settle_q <= 4'd8;
    else if (settle_q != '0) settle_q <= settle_q - 4'd1;
  end

  weight_reader #(
      .DataBits(DataBits),
      .AddrBits(AddrBits)
  ) u_reader (
      .clk_i,
      .rst_i,
      .cmd_valid_i(cmd_valid),
      .cmd_ready_o(cmd_ready),
      .cmd_addr_i (run_i.weights),
      .cmd_beats_i(run_i.weight_beats),
      .out_valid_o(reader_valid),
      .out_ready_i(reader_ready),
      .out_data_o (beat),
      .bus_error_o,
      .m_axi_w0_araddr,
      .m_axi_w0_arlen,
      .m_axi_w0_arsize,
      .m_axi_w0_arburst,
      .m_axi_w0_arvalid,
      .m_axi_w0_arready,
      .m_axi_w0_rdata,
      .m_axi_w0_rresp,
      .m_axi_w0_rlast,
      .m_axi_w0_rvalid,
      .m_axi_w0_rready,
      .m_axi_w1_araddr,
      .m_axi_w1_arlen,
      .m_axi_w1_arsize,
      .m_axi_w1_arburst,
      .m_axi_w1_arvalid,
      .m_axi_w1_arready,
      .m_axi_w1_rdata,
      .m_axi_w1_rresp,
      .m_axi_w1_rlast,
      .m_axi_w1_rvalid,
      .m_axi_w1_rready,
      .m_axi_w2_araddr,
      .m_axi_w2_arlen,
      .m_axi_w2_arsize,
      .m_axi_w2_arburst,
      .m_axi_w2_arvalid,
      .m_axi_w2_arready,
      .m_axi_w2_rdata,
      .m_axi_w2_rresp,
      .m_axi_w2_rlast,
      .m_axi_w2_rvalid,
      .m_axi_w2_rready
  );

  weight_unpack #(
      .G(G),
      .T(T),
      .Q(Q)
  ) u_unpack (
      .clk_i,
      .rst_i,
      .cmd_valid_i  (active_i && !unpack_asked_q),
      .cmd_ready_o  (unpack_cmd_ready),
      .cmd_vectors_i(run_i.vectors),
      .cmd_norms_i  (run_i.norm ? run_i.inputs : '0),
      .in_valid_i   (reader_valid && active_i && unpack_asked_q),
      .in_ready_o   (unpack_ready),
      .in_data_i    (beat),
      .vec_valid_o,
      .vec_ready_i,
      .vec_data_o,
      .norm_valid_o,
      .norm_ready_i (1'b1),
      .norm_data_o,
      .bad_index_o
  );

endmodule

`default_nettype wire
