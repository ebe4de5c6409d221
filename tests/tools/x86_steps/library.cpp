// The stepped code's own calls of these end here, where the run recognises them (stepped.cpp). No header
// declares them in this file, so that they are hidden and come before the C library's.
extern "C" {

[[gnu::visibility("hidden")]] void* memcpy(void* to, const void* from, unsigned long bytes) {
  void* const start = to;
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes)::"memory");
  return start;
}

[[gnu::visibility("hidden")]] void* memset(void* to, int value, unsigned long bytes) {
  void* const start = to;
  asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
  return start;
}
}
