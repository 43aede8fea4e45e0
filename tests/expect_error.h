#pragma once
// EXPECT_ERROR(statement, part): it throws an Error of one line that contains part.
#include <gtest/gtest.h>

#include <string>

#include "core/error.h"

namespace entrain {

template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "(no error)";
}

}  // namespace entrain

#define EXPECT_ERROR(statement, part)                                       \
  {                                                                         \
    const std::string message = entrain::error_of([&] { statement; });      \
    EXPECT_NE(message.find(part), std::string::npos) << "got: " << message; \
    EXPECT_EQ(message.find('\n'), std::string::npos) << "got: " << message; \
  }
