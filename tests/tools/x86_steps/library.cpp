// The stepped code's calls of these end here (the library is linked with -Bsymbolic), where the run
// recognises them (stepped.cpp).
extern "C" {

void* memcpy(void* to, const void* from, unsigned long bytes) {
  void* const start = to;
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes)::"memory");
  return start;
}

void* memset(void* to, int value, unsigned long bytes) {
  void* const start = to;
  asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
  return start;
}
}
