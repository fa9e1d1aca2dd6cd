// Three symbols that GCC's headers ask of a newer C library than OpenVINO itself needs (glibc 2.28, GCC 8's libstdc++;
// the wheel's tag is manylinux_2_28). Defined here, hidden, they are no longer asked for.

#pragma once

#include <new>
#include <sstream>

#ifdef __GLIBCXX__

#if __has_include(<sys/single_threaded.h>)
// glibc 2.32: nonzero lets a shared_ptr count without atomic operations. Zero is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif

// GLIBCXX_3.4.29: new[] of a negative or too large count.
namespace std {
__attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// GLIBCXX_3.4.26: the constructor without arguments, which OpenVINO's assertions use.
template std::basic_ostringstream<char>::basic_ostringstream();

#endif
