#pragma once
// What the writer and the reader of token stores agree on.
#include <zlib.h>

#include <cstddef>
#include <cstdint>

#include "core/error.h"
#include "core/h5.h"

namespace entrain {

inline constexpr const char* token_store_format = "entrain token store 1";

inline DType token_dtype(int vocab) {
  return vocab <= 65536 ? DType::u16 : DType::u32;
}

inline bool is_token_store(const h5::File& file) {
  return file.has_attribute("", "format") && file.text("", "format") == token_store_format;
}

inline uint32_t checksum(uint32_t so_far, const void* data, size_t bytes) {
  return static_cast<uint32_t>(crc32_z(so_far, static_cast<const Bytef*>(data), bytes));
}

}  // namespace entrain
