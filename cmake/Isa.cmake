# SPDX-License-Identifier: Apache-2.0
# One source per instruction-set level. Shared code is compiled for x86-64-v2, each level's file for exactly its level,
# never for the building machine, so that a wheel runs on every processor and picks its level when it loads.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(TILEWRIGHT_X86 ON)
endif()
# GCC 12 sees the deliberately undefined operands of its own intrinsics as uninitialised.
set(TILEWRIGHT_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2 -Wno-maybe-uninitialized -Wno-uninitialized)
set(TILEWRIGHT_FLAGS_avx512 ${TILEWRIGHT_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
                            -mprefer-vector-width=512)
set(TILEWRIGHT_FLAGS_avx512_bf16 ${TILEWRIGHT_FLAGS_avx512} -mavx512bf16)

# -ffp-contract=off: a multiply-add is fused exactly where the source says so, hence the same bits at every level.
function(tilewright_baseline target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
  if(TILEWRIGHT_X86)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-march=x86-64-v2>)
  endif()
endfunction()

function(tilewright_level target level)
  if(TILEWRIGHT_X86)
    target_sources(${target} PRIVATE ${ARGN})
    set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS "${TILEWRIGHT_FLAGS_${level}}")
  endif()
endfunction()

# The probe runs before anything is known about the processor.
function(tilewright_probe target source)
  target_sources(${target} PRIVATE ${source})
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-fno-lto;-O1")
endfunction()
