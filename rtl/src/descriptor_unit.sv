// SPDX-License-Identifier: Apache-2.0
// Takes a 64-byte descriptor from its reader apart, completes it by what the settings and two serial divisions say, and checks it
// against the build. end_o and bad_o name what is no run: a layer's end, and what cannot be done.
//
// The words are those of tilewright.edge.program.Descriptor, word 0 in the lowest bits. Refused are: sizes, counts of heads and
// places outside the build's or the settings' range; numbers of buffers that do not exist, and the caches as rows to read; rows
// and matrices that do not begin at a beat; a LINEAR without ENTER whose inputs are not as many as were entered last; a
// row for the cache that is not as long as its heads; heads that are no multiple of the key heads.
`default_nettype none

module descriptor_unit
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
    parameter int unsigned AttentionBeatsMax = 96  // of a row of queries
) (
    input  wire logic                  clk_i,
    input  wire logic                  rst_i,
    input  wire logic                  take_i,  // the next descriptor may be taken
    input  wire logic                  in_valid_i,
    output logic                       in_ready_o,
    input  wire logic [  Lanes*16-1:0] in_data_i,
    output logic                       done_o,  // for one cycle: run_o, or one of the next
    output logic                       end_o,
    output logic                       bad_o,
    output run_t                       run_o,
    // settings
    input  wire logic [          31:0] tokens_i,
    input  wire logic [          31:0] first_i,
    input  wire logic [          31:0] capacity_i,
    input  wire logic [8*AddrBits-1:0] base_i,
    input  wire address_t              weights_i,
    input  wire address_t              angles_i
);

  localparam int unsigned Beats = 512 / (16 * Lanes);
  localparam int unsigned Block = T * G;
  localparam int unsigned LaneShift = $clog2(Lanes);

  typedef enum logic [2:0] {
    Collect,
    DivideInputs,
    DivideOutputs,
    Multiply,
    Place,
    Check
  } state_e;

  state_e state_q;
  logic [511:0] words_q;
  logic [$clog2(Beats+1)-1:0] left_q;

  assign in_ready_o = state_q == Collect && take_i;

  // --- words
  logic [31:0] op, flags, mode, source, target, side, inputs, outputs, address, beats, geometry, layer;
  logic [15:0] head_size;
  assign {op, flags, mode, source} = {words_q[31:0], words_q[63:32], words_q[95:64], words_q[127:96]};
  assign {target, side, inputs, outputs} = {words_q[159:128], words_q[191:160], words_q[223:192], words_q[255:224]};
  assign {address, beats} = {words_q[287:256], words_q[319:288]};
  assign {geometry, layer} = {words_q[479:448], words_q[511:480]};
  assign head_size = geometry[31:16];
  wire logic attend = op == OpAttend;

  // --- ceil(inputs / (T G)) and ceil(outputs / Q), one after the other
  logic divide_valid, divide_ready, quotient_valid;
  logic [17:0] dividend, quotient;
  logic [8:0] divisor;
  logic asked_q;

  divider #(
      .DividendBits(18),
      .DivisorBits(9)
  ) u_divide (
      .clk_i,
      .rst_i,
      .valid_i   (divide_valid),
      .ready_o   (divide_ready),
      .dividend_i(dividend),
      .divisor_i (divisor),
      .valid_o   (quotient_valid),
      .ready_i   (1'b1),
      .quotient_o(quotient)
  );
  // Of an attention the first is heads / key heads instead.
  always_comb begin
    dividend = 18'(outputs) + 18'(Q - 1);
    if (state_q == DivideInputs) dividend = attend ? 18'(geometry[7:0]) : 18'(inputs) + 18'(Block - 1);
    divisor = 9'(Q);
    if (state_q == DivideInputs) divisor = attend ? 9'(geometry[15:8]) : 9'(Block);
  end
  assign divide_valid = (state_q == DivideInputs || state_q == DivideOutputs) && !asked_q;

  // --- places: products of a row's bytes with counts of rows
  function automatic address_t buffer_base(input logic [31:0] number, input logic [8*AddrBits-1:0] bases);
    buffer_base = bases[number[2:0]*AddrBits+:AddrBits];
  endfunction

  wire logic [LaneShift:0] keys = base_i[BufferKeys[2:0]*AddrBits+:LaneShift+1];
  wire logic [LaneShift:0] values = base_i[BufferValues[2:0]*AddrBits+:LaneShift+1];
  logic [31:0] cache_row_q, capacity_rows_q, newest;
  logic [15:0] in_beats, out_beats, kv_beats, head_beats;
  logic in_cache, rotates, pairs;
  address_t cache_stride;

  assign in_beats   = 16'((inputs + 32'(Lanes - 1)) >> LaneShift);
  assign out_beats  = attend ? 16'(geometry[7:0] * head_beats) : 16'((outputs + 32'(Lanes - 1)) >> LaneShift);
  assign head_beats = head_size >> LaneShift;
  assign kv_beats   = 16'(geometry[15:8] * head_beats);
  assign in_cache   = !attend && (target == BufferKeys || target == BufferValues);
  assign rotates    = !attend && mode == 32'(fuse_pkg::Rope);
  assign pairs      = !attend && !rotates && mode != 32'(fuse_pkg::Bypass);
  // The row that is written or read first: a linear begins with the oldest of the new rows, an attention with the newest.
  assign newest       = attend ? first_i + tokens_i - 32'd1 : first_i;
  assign cache_stride = (attend ? address_t'(kv_beats) : address_t'(out_beats)) << (LaneShift + 1);

  function automatic logic of_rows(input logic [31:0] number);
    of_rows = number != '0 && number < BufferKeys;
  endfunction

  logic [14:0] entered_q;  // inputs of the row that is in the activation store
  logic bad_settings, bad_heads, bad_attend, bad_linear, bad_place, bad;

  always_comb begin
    bad_settings = tokens_i == '0 || tokens_i > 32'(RowsMax) || capacity_i > 32'd4096 || first_i > 32'd4096
                   || first_i + tokens_i > capacity_i || layer[31:16] != '0;
    bad_heads    = head_size == '0 || head_size[LaneShift-1:0] != '0 || 32'(head_beats) > HeadBeatsMax;
    bad_attend   = bad_heads || geometry[7:0] == '0 || geometry[15:8] == '0 || 32'(geometry[7:0]) > HeadsMax
                   || 32'(geometry[15:8]) > KvHeadsMax || 32'(out_beats) > AttentionBeatsMax
                   || 16'(run_o.blocks * 16'(geometry[15:8])) != 16'(geometry[7:0])
                   || !of_rows(source) || !of_rows(target);
    bad_linear   = op != OpLinear || inputs == '0 || outputs == '0 || inputs > 32'd16384 || outputs > 32'd65535
                   || 32'(in_beats) > RowBeatsMax || 32'(run_o.blocks) > BlocksMax || 32'(run_o.sweep_beats) > BeatsMax
                   || 32'(run_o.vectors) > WeightWords * (Q / 2) || mode > 32'(fuse_pkg::SquaredRelu) || beats == '0
                   || beats[31:24] != '0 || (rotates && bad_heads) || (pairs && !of_rows(side))
                   || (flags[0] ? !of_rows(source) : inputs[14:0] != entered_q)
                   || target == '0 || target > BufferValues || (in_cache && out_beats != kv_beats);
    // Where a place within a beat is no place to begin.
    bad_place    = run_o.target[LaneShift:0] != '0 || (!attend && run_o.weights[LaneShift:0] != '0)
                   || ((attend || flags[0]) && run_o.source[LaneShift:0] != '0)
                   || ((rotates || pairs) && run_o.side[LaneShift:0] != '0)
                   || (attend && (keys | values) != '0);
    bad          = bad_settings || bad_place || (attend ? bad_attend : bad_linear);
  end

  always_ff @(posedge clk_i) begin
    done_o <= 1'b0;
    if (rst_i) begin
      state_q   <= Collect;
      left_q    <= ($clog2(Beats + 1))'(Beats);
      asked_q   <= 1'b0;
      entered_q <= '0;
    end else begin
      case (state_q)
        Collect: begin
          if (in_valid_i && in_ready_o) begin
            left_q <= left_q - 1'b1;
            if (32'(left_q) == 1) begin
              left_q  <= ($clog2(Beats + 1))'(Beats);
              state_q <= DivideInputs;
            end
          end
        end
        DivideInputs, DivideOutputs: begin
          if (divide_valid && divide_ready) asked_q <= 1'b1;
          if (quotient_valid) begin
            asked_q <= 1'b0;
            state_q <= state_q == DivideInputs ? DivideOutputs : Multiply;
          end
        end
        Multiply: state_q <= Place;
        Place:    state_q <= Check;
        default: begin
          state_q <= Collect;
          done_o  <= 1'b1;
          end_o   <= op == OpEnd;
          bad_o   <= op != OpEnd && bad;
          if (op == OpLinear && flags[0]) entered_q <= inputs[14:0];
        end
      endcase
    end
  end

  always_ff @(posedge clk_i) begin
    if (in_valid_i && in_ready_o) words_q <= 512'({in_data_i, words_q} >> (16 * Lanes));
    if (quotient_valid && state_q == DivideInputs) run_o.blocks <= 16'(quotient);
    if (quotient_valid && state_q == DivideOutputs) run_o.sweep_beats <= 16'(quotient);

    if (state_q == Multiply) begin
      run_o.vectors    <= 24'(run_o.blocks * (24'(run_o.sweep_beats) * 24'(Q)));
      run_o.sweep_tail <= 16'(outputs - (32'(run_o.sweep_beats) - 32'd1) * 32'(Q));
      capacity_rows_q  <= 32'(16'(layer) * 16'(capacity_i));
      cache_row_q      <= capacity_i - 32'd1 - newest;
    end

    if (state_q == Place) begin
      run_o.attend        <= attend;
      run_o.enter         <= flags[0];
      run_o.norm          <= flags[0] && flags[1];
      run_o.mode          <= mode[2:0];
      run_o.inputs        <= inputs[14:0];
      run_o.in_beats      <= in_beats;
      run_o.outputs       <= outputs[15:0];
      run_o.out_beats     <= out_beats;
      run_o.weight_beats  <= beats[23:0];
      run_o.weights       <= weights_i + address_t'(address);
      run_o.mantissa      <= words_q[336:320];
      run_o.exponent      <= words_q[359:352];
      run_o.eps           <= words_q[430:384];
      run_o.heads         <= geometry[7:0];
      run_o.kv_heads      <= geometry[15:8];
      run_o.head_beats    <= 8'(head_beats);
      run_o.kv_beats      <= kv_beats;
      run_o.rows          <= 16'(tokens_i);
      run_o.first         <= 13'(first_i);
      run_o.source        <= buffer_base(source, base_i);
      run_o.side          <= rotates ? angles_i + address_t'(16'(first_i) * head_size) * address_t'(2)
                                     : buffer_base(side, base_i);
      run_o.side_stride   <= rotates ? address_t'(head_size) << 1 : address_t'(out_beats) << (LaneShift + 1);
      run_o.side_beats    <= rotates ? head_beats : out_beats;
      run_o.cache         <= (address_t'(capacity_rows_q) + address_t'(cache_row_q)) * cache_stride;
      run_o.target        <= buffer_base(target, base_i)
                             + (in_cache ? (address_t'(capacity_rows_q) + address_t'(cache_row_q)) * cache_stride : '0);
      run_o.target_stride <= in_cache ? -cache_stride : address_t'(out_beats) << (LaneShift + 1);
    end
  end

endmodule

`default_nettype wire
