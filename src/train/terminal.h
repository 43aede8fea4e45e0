#pragma once
// Whether someone watches, and on how large a screen.
#include <cstddef>
#include <cstdio>

namespace entrain {

/// A terminal, also one that mpirun writes to for this rank.
bool is_terminal(std::FILE* out);

struct Screen {
  size_t rows, columns;
};

/// 24 x 80 where it is not known.
Screen screen_size(std::FILE* out);

}  // namespace entrain
