// Runs compiled code one instruction at a time on any x86-64 Linux, and takes over the instructions that the
// CPU need not have: all with a VEX or EVEX prefix, which are those on vectors, masks and tiles. Their
// registers are kept here (machine.h); what they do is written down from Intel's Software Developer's Manual,
// and for the sake of what they are checked against shares no code with the library. Other instructions run
// as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace stepped {

// Memory that the code may use beside its stack and its constants.
struct Range {
  const void* begin;
  size_t bytes;
  bool writable;
};

// fn(arg), from registers full of 0xa5. "" or why it was stopped: an access beyond the ranges, an instruction
// that the manual forbids here (such as one on tiles whose sizes do not agree), or one that is not known.
const char* run(void (*fn)(void*), void* arg, std::initializer_list<Range> ranges);

// How many instructions of this name were taken over since the library was loaded.
int64_t executed(const char* name);

}  // namespace stepped
