// Preloaded into a test's process. While it is on for a thread, each of its allocations (tensors, aligned memory and
// operator new) ends as close to a page without permissions as its alignment allows, and another such page lies before.
// What lies between is 0xFF (NaN), and must be so still when it is freed. Allocations can be made to fail.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" void __libc_free(void*);
extern "C" void* __libc_memalign(size_t, size_t);

namespace {

size_t page = 0;
constexpr size_t kArena = size_t{1} << 38;
thread_local bool on = false;
std::atomic<char*> next{nullptr};
char* arena = nullptr;
size_t* bytes_of_page = nullptr;  // of the allocation whose first page this is
std::atomic<int64_t> to_fail{-1}, live{0};
size_t least_to_fail = 0;

void* reserve(size_t bytes, int access) {
  void* const p = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return p;
}

__attribute__((constructor)) void start() {
  page = sysconf(_SC_PAGESIZE);
  arena = static_cast<char*>(reserve(kArena, PROT_NONE));
  bytes_of_page = static_cast<size_t*>(reserve(kArena / page * sizeof(size_t), PROT_READ | PROT_WRITE));
  next = arena + page;
}

bool mine(const void* p) { return arena != nullptr && p >= arena && p < arena + kArena; }
size_t pages_of(size_t bytes) { return (bytes + page - 1) / page * page; }

// Whether this allocation is the one that shall fail.
bool fails(size_t bytes) { return bytes >= least_to_fail && to_fail >= 0 && to_fail-- == 0; }

void* guarded(size_t alignment, size_t bytes) {
  const size_t size = (bytes < 1 ? alignment : (bytes + alignment - 1) / alignment * alignment), body = pages_of(size);
  char* const first = next.fetch_add(static_cast<ptrdiff_t>(body + page));
  if (alignment > page || first + body + page > arena + kArena) std::abort();
  if (mprotect(first, body, PROT_READ | PROT_WRITE) != 0) std::abort();
  std::memset(first, 0xFF, body);
  bytes_of_page[(first - arena) / page] = bytes;
  ++live;
  return first + body - size;
}

void check_and_release(char* p) {
  char* const first = arena + (p - arena) / page * page;
  const size_t bytes = bytes_of_page[(first - arena) / page], body = pages_of(p - first + (bytes < 1 ? 1 : bytes));
  for (char* c = first; c < first + body; ++c) {
    if (c == p) c += bytes;
    if (c < first + body && *c != static_cast<char>(0xFF)) {
      std::fprintf(stderr, "guard_heap: written at %td of an allocation of %zu bytes\n", c - p, bytes);
      std::abort();
    }
  }
  if (mmap(first, body, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
    std::abort();
  --live;
}

}  // namespace

extern "C" {

void guard_heap(int whether) { on = whether != 0; }

// Of the allocations of at least so many bytes, the one that follows after `count` others fails.
void guard_heap_fail(int64_t count, size_t bytes) {
  least_to_fail = bytes;
  to_fail = count;
}
// Whether it has failed.
int guard_heap_failed() { return to_fail < 0; }
int64_t guard_heap_live() { return live; }

void free(void* p) {
  if (mine(p)) {
    check_and_release(static_cast<char*>(p));
  } else {
    __libc_free(p);
  }
}

int posix_memalign(void** p, size_t alignment, size_t bytes) {
  *p = on && fails(bytes) ? nullptr : on ? guarded(alignment, bytes) : __libc_memalign(alignment, bytes);
  return *p == nullptr ? ENOMEM : 0;
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  void* p = nullptr;
  posix_memalign(&p, alignment, bytes);
  return p;
}
}

void* operator new(size_t bytes) {
  void* const p = on && fails(bytes) ? nullptr : on ? guarded(16, bytes) : std::malloc(bytes);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
