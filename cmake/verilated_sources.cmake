# SPDX-License-Identifier: Apache-2.0
# Verilator names its files by what is in the design; here they become two of fixed names: run often, and run once.
#   cmake -DFOLDER=... -P verilated_sources.cmake
file(GLOB sources ${FOLDER}/Vaccelerator*.cpp)
set(fast ${sources})
list(FILTER fast EXCLUDE REGEX "__Slow\\.cpp$")
set(slow ${sources})
list(FILTER slow INCLUDE REGEX "__Slow\\.cpp$")
foreach(kind fast slow)
  set(text "")
  foreach(source IN LISTS ${kind})
    get_filename_component(name ${source} NAME)
    string(APPEND text "#include \"${name}\"\n")
  endforeach()
  file(WRITE ${FOLDER}/${kind}.cpp "${text}")
endforeach()
