// SPDX-License-Identifier: Apache-2.0
// sqrt(width / total) as r 2^(-k/2): k is the least even number with width 2^k >= total 2^32, and
// r = floor(sqrt(floor(width 2^k / total))). One restoring division, 34 cycles, then a restoring square root, 17 cycles.
//
// With k the least one the quotient is below 2^34, so its 34 bits need a start from width 2^k >> 34, which is below total;
// and r is below 2^17. k starts where the lengths of both sides put it, or one above if that is odd, and is raised by two at
// most twice. It stays within 18 .. 82, since total has at most 49 bits and width 15.
`default_nettype none

module inverse_root (
    input  wire logic        clk_i,
    input  wire logic        rst_i,
    input  wire logic        start_i,
    input  wire logic [48:0] total_i,  // not zero
    input  wire logic [14:0] width_i,  // not zero
    output logic             done_o,   // for one cycle; the result stays until the next start
    output logic      [16:0] root_o,
    output logic      [ 5:0] half_k_o
);

  typedef enum logic [1:0] {
    Idle,
    Search,
    Divide,
    Root
  } state_e;

  state_e state_q;
  logic [48:0] total_q;
  logic [14:0] width_q;
  logic [6:0] k_q;
  logic [5:0] left_q;

  // --- lengths, and whether k is large enough
  logic [5:0] total_length, width_length;
  logic [6:0] first_k;
  logic enough;

  always_comb begin
    total_length = '0;
    width_length = '0;
    for (int unsigned place = 0; place < 49; place++) if (total_i[place]) total_length = 6'(place + 1);
    for (int unsigned place = 0; place < 15; place++) if (width_i[place]) width_length = 6'(place + 1);
    first_k = 7'd31 + 7'(total_length) - 7'(width_length);
    first_k = first_k + 7'(first_k[0]);
    enough  = k_q >= 7'd32 ? (66'(width_q) << (k_q - 7'd32)) >= 66'(total_q)
                           : 66'(width_q) >= (66'(total_q) << (7'd32 - k_q));
  end

  // --- one bit a cycle: of the quotient, whose dividend's low bits come from below, then of the root
  logic [48:0] remainder_q;
  logic [33:0] quotient_q;
  logic [49:0] next;
  logic fits;

  assign next = {remainder_q, quotient_q[33]};
  assign fits = next >= 50'(total_q);

  logic [18:0] rest_q;
  logic [16:0] root_q;
  logic [20:0] drawn, trial;
  logic root_fits;

  assign drawn     = {rest_q, quotient_q[33:32]};
  assign trial     = {2'b00, root_q, 2'b01};
  assign root_fits = drawn >= trial;

  assign root_o   = root_q;
  assign half_k_o = k_q[6:1];

  always_ff @(posedge clk_i) begin
    done_o <= 1'b0;
    if (rst_i) begin
      state_q <= Idle;
    end else begin
      case (state_q)
        Idle:   if (start_i) state_q <= Search;
        Search: if (enough) state_q <= Divide;
        Divide: if (left_q == 6'd1) state_q <= Root;
        Root: begin
          if (left_q == 6'd1) begin
            state_q <= Idle;
            done_o  <= 1'b1;
          end
        end
      endcase
    end
  end

  always_ff @(posedge clk_i) begin
    case (state_q)
      Idle: begin
        if (start_i) begin
          total_q <= total_i;
          width_q <= width_i;
          k_q     <= first_k;
        end
      end
      Search: begin
        k_q    <= enough ? k_q : k_q + 7'd2;
        left_q <= 6'd34;
        if (k_q >= 7'd34) begin
          remainder_q <= 49'(width_q) << (k_q - 7'd34);
          quotient_q  <= '0;
        end else begin
          remainder_q <= 49'(width_q >> (7'd34 - k_q));
          quotient_q  <= 34'(width_q) << k_q;
        end
      end
      Divide: begin
        remainder_q <= fits ? 49'(next - 50'(total_q)) : 49'(next);
        quotient_q  <= {quotient_q[32:0], fits};
        left_q      <= left_q == 6'd1 ? 6'd17 : left_q - 6'd1;
        rest_q      <= '0;
        root_q      <= '0;
      end
      Root: begin
        rest_q     <= 19'(root_fits ? drawn - trial : drawn);
        root_q     <= {root_q[15:0], root_fits};
        quotient_q <= quotient_q << 2;
        left_q     <= left_q - 6'd1;
      end
    endcase
  end

endmodule

`default_nettype wire
