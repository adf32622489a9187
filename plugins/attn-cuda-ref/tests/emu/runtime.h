// What the emulator's headers ask of its runtime. No include: it is parsed with every kernel.
#pragma once

namespace emu {

struct Index {
  unsigned x, y, z;
};

// Where in the kernel's text something was asked for: filled in at the call, by default arguments.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
#define EMU_HERE emu::here()

// What a CUDA thread can ask about itself.
struct Thread {
  Index thread, block, block_size, grid_size;
  unsigned id, lane;
};
// The CUDA thread that this OS thread runs at the moment. One load: no call into the linker's TLS code.
extern __thread Thread* self __attribute__((tls_model("initial-exec")));

enum class Operation { none, sync_block, sync_warp, shuffle, vote, ldmatrix, mma, named_barrier };
enum class Vote { ballot, all, any };

// Ends the launch with a message; what, and where if the caller knows.
[[noreturn]] void fault(const char* what, Site site);

void sync_block(Site site);
void sync_warp(unsigned mask, Site site);
void sync_named(int id, int threads, bool waits, Site site);
unsigned long shuffle(unsigned mask, unsigned long value, unsigned source, Site site);
unsigned vote(unsigned mask, Vote kind, bool value, Site site);
// All 32 lanes give a row; each gets back the rows of all.
void exchange_rows(const void* row, const void* (&rows)[32], Site site);
void mma_m16n8k16(bool brain, float* sums, const unsigned* a, const unsigned* b, Site site);

// An array of shared memory: the same for all threads of the block, behind a gap from the one before.
void* take_shared(unsigned count, unsigned item_bytes, unsigned& arrays_taken, Site site);

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes;
};
void copy_begin(Copy copy, Site site);
void copy_commit();
// How many copies a wait that leaves `groups` groups in flight brings in; then they come one by one.
unsigned copies_due(int groups);
Copy copy_next();

// ---- how a kernel is called ----
template <class T>
struct Code {  // a value of a type of the caller's own
  static constexpr char code = 's';
};
template <class T>
struct Code<T*> {
  static constexpr char code = 'p';
};
template <class T>
struct Code<const T*> {
  static constexpr char code = 'c';
};
template <>
struct Code<int> {
  static constexpr char code = 'i';
};
template <>
struct Code<long long> {
  static constexpr char code = 'l';
};
template <>
struct Code<long> {
  static constexpr char code = 'l';
};
template <>
struct Code<float> {
  static constexpr char code = 'f';
};
template <>
struct Code<double> {
  static constexpr char code = 'd';
};

struct Parameter {
  char code;  // p pointer, c pointer to const, i int, l long long, f float, d double, s anything else by value
  int bytes;
};

template <unsigned long... I>
struct Indices {};

template <class... A, unsigned long... I>
__attribute__((no_sanitize("thread"))) inline void call(void (*kernel)(A...), void** arguments, Indices<I...>) {
  kernel(*(A*)arguments[I]...);
}
template <class... A>
inline void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, Indices<__integer_pack(sizeof...(A))...>());
}
template <class... A>
inline const Parameter* parameters(void (*)(A...)) {
  static const Parameter list[] = {Parameter{Code<A>::code, (int)sizeof(A)}..., Parameter{0, 0}};
  return list;
}

}  // namespace emu

// Stands after the kernel's text: what the emulator looks for in what was compiled.
#define EMU_ENTRY(kernel)                                                                            \
  extern "C" void emu_call(void** arguments) { emu::call(kernel, arguments); }                       \
  extern "C" const emu::Parameter* emu_parameters() { return emu::parameters(kernel); }
