// Runs one launch in a process of its own, for the sanitizers that want to own the process: reads it from a file, gives
// each tensor memory of exactly its size, and writes the tensors back. sanitized.py writes and reads the file.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

extern "C" int emu_launch(const emu::Launch* launch);
extern "C" void emu_call(void** arguments);

namespace {

struct Header {
  emu::Index grid, block;
  uint64_t shared_bytes, seed;
  int schedule, arguments;
};
struct Given {
  uint64_t value;  // the bits of a number, or how many bytes of a tensor follow
  int is_tensor, unused;
};

void must(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "%s\n", what);
  exit(2);
}

}  // namespace

int main(int count, char** words) {
  must(count == 3, "usage: PROGRAM KERNEL FILE");
  FILE* file = fopen(words[2], "r+b");
  must(file, "the launch's file cannot be opened");
  Header header;
  must(fread(&header, sizeof header, 1, file) == 1, "the launch's file is too short");
  const int arguments = header.arguments;
  Given* given = (Given*)calloc(arguments + 1, sizeof(Given));
  void** values = (void**)calloc(arguments + 1, sizeof(void*));
  void** pointers = (void**)calloc(arguments + 1, sizeof(void*));
  must((int)fread(given, sizeof(Given), arguments, file) == arguments, "the launch's file is too short");
  const long data = ftell(file);
  for (int i = 0; i < arguments; i++) {
    if (given[i].is_tensor) {
      pointers[i] = malloc(given[i].value);
      must(fread(pointers[i], 1, given[i].value, file) == given[i].value, "the launch's file is too short");
    }
    values[i] = given[i].is_tensor ? (void*)&pointers[i] : (void*)&given[i].value;
  }
  char message[4096] = "";
  emu::Launch launch{};
  launch.kernel = words[1], launch.grid = header.grid, launch.block = header.block;
  launch.shared_bytes = header.shared_bytes, launch.call = emu_call, launch.arguments = values;
  launch.schedule = header.schedule, launch.seed = header.seed, launch.workers = 1;
  launch.message = message, launch.message_room = sizeof message;
  if (emu_launch(&launch)) {
    fprintf(stderr, "%s\n", message);
    return 3;
  }
  fseek(file, data, SEEK_SET);
  for (int i = 0; i < arguments; i++)
    if (given[i].is_tensor)
      must(fwrite(pointers[i], 1, given[i].value, file) == given[i].value, "the launch's file cannot be written");
  fclose(file);
  return 0;
}
