// Errors that native code throws: a code of src/errors.ts and a text with the real values. Never exits or
// aborts.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace tp {

class Error : public std::runtime_error {
 public:
  Error(const char* code, const std::string& text) : std::runtime_error(text), code_(code) {}
  const std::string& code() const { return code_; }

 private:
  std::string code_;
};

[[noreturn]] [[gnu::format(printf, 2, 3)]] inline void fail(const char* code, const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Error(code, text);
}

}  // namespace tp
