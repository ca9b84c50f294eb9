// SPDX-License-Identifier: Apache-2.0
// A run: descriptors from memory are carried out one after the other, each when the one before has been answered by memory,
// until one ends the run. A descriptor that cannot be carried out ends it too, and so does an error of the bus: one that was
// read with an error is not carried out, and none follows one in whose course an error came.
`default_nettype none

module sequencer
  import run_pkg::*;
#(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned Lanes = 16,
    parameter int unsigned WeightWords = 12288,
    parameter int unsigned RowBeatsMax = 256,
    parameter int unsigned BlocksMax = 49,
    parameter int unsigned BeatsMax = 256,
    parameter int unsigned RowsMax = 16,
    parameter int unsigned HeadsMax = 16,
    parameter int unsigned KvHeadsMax = 16,
    parameter int unsigned HeadBeatsMax = 16,
    parameter int unsigned AttentionBeatsMax = 128
) (
    input  wire logic                  clk_i,
    input  wire logic                  rst_i,
    input  wire logic                  start_i,
    output logic                       finished_o,  // for one cycle
    output logic                       bad_o,  // sticky
    output logic                       descriptor_o,  // for one cycle: one more has been read
    input  wire logic                  bus_error_i,  // sticky, of all ports
    // settings
    input  wire address_t              program_i,
    input  wire logic [          31:0] tokens_i,
    input  wire logic [          31:0] first_i,
    input  wire logic [          31:0] capacity_i,
    input  wire logic [8*AddrBits-1:0] base_i,
    input  wire address_t              weights_i,
    input  wire address_t              angles_i,
    // the program
    output logic                       fetch_valid_o,
    input  wire logic                  fetch_ready_i,
    output address_t                   fetch_addr_o,
    input  wire logic                  in_valid_i,
    output logic                       in_ready_o,
    input  wire logic [  Lanes*16-1:0] in_data_i,
    // what is carried out
    output run_t                       run_o,
    output logic                       linear_start_o,
    output logic                       linear_o,
    input  wire logic                  linear_busy_i,
    input  wire logic                  linear_bad_i,
    output logic                       attend_start_o,
    output logic                       attend_o,
    input  wire logic                  attend_busy_i
);

  localparam int unsigned DescriptorBytes = 64;

  typedef enum logic [2:0] {
    Idle,
    Fetch,
    Decode,
    Begin,
    Linear,
    Attend
  } state_e;

  state_e state_q;
  logic decoded, is_end, is_bad;

  assign fetch_valid_o  = state_q == Fetch;
  assign descriptor_o   = state_q == Decode && decoded;
  assign linear_start_o = state_q == Begin && !run_o.attend;
  assign attend_start_o = state_q == Begin && run_o.attend;
  assign linear_o       = state_q == Linear;
  assign attend_o       = state_q == Attend;

  always_ff @(posedge clk_i) begin
    finished_o <= 1'b0;
    if (rst_i) begin
      state_q <= Idle;
      bad_o   <= 1'b0;
    end else begin
      case (state_q)
        Idle:   if (start_i) state_q <= Fetch;
        Fetch:  if (fetch_ready_i) state_q <= Decode;
        Decode: begin
          if (decoded) begin
            state_q    <= is_end || is_bad || bus_error_i ? Idle : Begin;
            finished_o <= is_end || is_bad || bus_error_i;
            bad_o      <= is_bad && !bus_error_i;
          end
        end
        Begin:  state_q <= run_o.attend ? Attend : Linear;
        Linear: begin
          if (!linear_busy_i) begin
            state_q    <= linear_bad_i || bus_error_i ? Idle : Fetch;
            finished_o <= linear_bad_i || bus_error_i;
            bad_o      <= linear_bad_i;
          end
        end
        default: begin
          if (!attend_busy_i) begin
            state_q    <= bus_error_i ? Idle : Fetch;
            finished_o <= bus_error_i;
          end
        end
      endcase
    end
    if (start_i) fetch_addr_o <= program_i;
    else if (state_q == Fetch && fetch_ready_i) fetch_addr_o <= fetch_addr_o + address_t'(DescriptorBytes);
  end

  descriptor_unit #(
      .G(G),
      .T(T),
      .Q(Q),
      .Lanes(Lanes),
      .WeightWords(WeightWords),
      .RowBeatsMax(RowBeatsMax),
      .BlocksMax(BlocksMax),
      .BeatsMax(BeatsMax),
      .RowsMax(RowsMax),
      .HeadsMax(HeadsMax),
      .KvHeadsMax(KvHeadsMax),
      .HeadBeatsMax(HeadBeatsMax),
      .AttentionBeatsMax(AttentionBeatsMax)
  ) u_descriptor (
      .clk_i,
      .rst_i,
      .take_i    (state_q == Decode),
      .in_valid_i(in_valid_i && state_q == Decode),
      .in_ready_o,
      .in_data_i,
      .done_o    (decoded),
      .end_o     (is_end),
      .bad_o     (is_bad),
      .run_o,
      .tokens_i,
      .first_i,
      .capacity_i,
      .base_i,
      .weights_i,
      .angles_i
  );

endmodule

`default_nettype wire
