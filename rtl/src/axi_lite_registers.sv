// SPDX-License-Identifier: Apache-2.0
// The accelerator's registers behind AXI4-Lite, and its counters. 32-bit words; of a 64-bit register the low word is at its
// offset, the high word at the next. What is not listed reads 0 and is not written; every answer is OKAY.
//
// 0x000 CONTROL  w: bit 0 start; r: bit 0 busy, bit 1 done (cleared by start)
// 0x004 STATUS   sticky bits; write ones to clear
// 0x008 ID "TWA1"   0x00C BUILD G | T << 4 | Q << 12 | P << 20 | Lanes << 24   0x010 ROWS_MAX
// 0x018 PROGRAM (64)   0x020 TOKENS   0x024 FIRST   0x028 CAPACITY
// 0x040 + 8 b: base of buffer b = 0 .. 7 (64)   0x080 WEIGHTS (64)   0x088 ANGLES (64)
// 0x100 CYCLES   0x108 LOAD   0x110 ENTER   0x118 SWEEP   0x120 ATTEND   0x128 WEIGHT_BEATS   0x130 KEY_ROWS
// 0x138 VALUE_ROWS   0x140 DESCRIPTORS: 64 bits each, of the run that is on or was last; to be read when it is done
//
// A start, and a write to anything but CONTROL and STATUS, is ignored while busy. Bits of an address past AddrBits read 0.
//
// A start gives unit_reset_o for a cycle, which clears the units' sticky bits, and start_o in the cycle after it. busy_o is
// high from unit_reset_o until done_i. A status bit is set by a rising edge, so that a unit's sticky bit, once it has been
// cleared here, stays cleared.
`default_nettype none

module axi_lite_registers #(
    parameter int unsigned G = 3,
    parameter int unsigned T = 28,
    parameter int unsigned Q = 16,
    parameter int unsigned P = 4,
    parameter int unsigned Lanes = 16,
    parameter int unsigned RowsMax = 64,
    parameter int unsigned AddrBits = 40,
    localparam int unsigned StatusBits = 10
) (
    input  wire logic                  clk_i,
    input  wire logic                  rst_i,
    // AXI4-Lite
    input  wire logic [          11:0] s_axil_awaddr,
    input  wire logic                  s_axil_awvalid,
    output logic                       s_axil_awready,
    input  wire logic [          31:0] s_axil_wdata,
    input  wire logic [           3:0] s_axil_wstrb,
    input  wire logic                  s_axil_wvalid,
    output logic                       s_axil_wready,
    output logic      [           1:0] s_axil_bresp,
    output logic                       s_axil_bvalid,
    input  wire logic                  s_axil_bready,
    input  wire logic [          11:0] s_axil_araddr,
    input  wire logic                  s_axil_arvalid,
    output logic                       s_axil_arready,
    output logic      [          31:0] s_axil_rdata,
    output logic      [           1:0] s_axil_rresp,
    output logic                       s_axil_rvalid,
    input  wire logic                  s_axil_rready,
    // a run
    output logic                       unit_reset_o,
    output logic                       start_o,
    input  wire logic                  done_i,  // pulse
    output logic                       busy_o,
    output logic                       done_o,  // level, for an interrupt
    input  wire logic [StatusBits-1:0] status_i,  // in the contract's order; levels
    // counted while busy: cycles of LOAD, ENTER, SWEEP, ATTEND; WEIGHT_BEATS, KEY_ROWS, VALUE_ROWS, DESCRIPTORS
    input  wire logic [           3:0] phase_i,
    input  wire logic [           3:0] event_i,
    // settings, which do not change while busy
    output logic      [  AddrBits-1:0] program_o,
    output logic      [          31:0] tokens_o,
    output logic      [          31:0] first_o,
    output logic      [          31:0] capacity_o,
    output logic      [8*AddrBits-1:0] base_o,  // of buffer b at b * AddrBits
    output logic      [  AddrBits-1:0] weights_o,
    output logic      [  AddrBits-1:0] angles_o
);

endmodule

`default_nettype wire
