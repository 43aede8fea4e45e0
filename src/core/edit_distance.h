#pragma once
// How far a mistyped word is from one that exists.
#include <cstddef>
#include <string_view>

namespace entrain {

/// Fewest insertions, deletions, replacements and swaps of neighbours that turn a into b.
size_t edit_distance(std::string_view a, std::string_view b);

}  // namespace entrain
