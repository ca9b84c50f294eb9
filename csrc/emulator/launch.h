// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/launch.h; included inside its namespace.

template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, const Params& params) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  require(grid.blocks.x <= 2147483647 && grid.blocks.y <= 65535 && grid.blocks.z <= 65535, "a grid of ", grid.blocks.x,
          " x ", grid.blocks.y, " x ", grid.blocks.z, " blocks is more than CUDA takes; split the input");
  struct Call {
    void (*kernel)(Params);
    const Params* params;
    [[gnu::no_sanitize("thread")]] static void run(const void* self) {
      const auto* call = static_cast<const Call*>(self);
      call->kernel(*call->params);
    }
  };
  const Call call{kernel, &params};
  const emulator::GridShape shape{grid.blocks.x, grid.blocks.y, grid.blocks.z,
                                  grid.threads,  grid.cluster,  grid.shared_bytes};
  emulator::run_grid(shape, &Call::run, &call, reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__, &params,
                     sizeof(Params));
}

inline int multiprocessors() { return emulator::multiprocessors(); }
