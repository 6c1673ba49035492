// _host: facts about the host CPU that neither Python nor torch reports. Does not use torch.
//
//   isa()         instruction set -> usable, from CPUID and the registers that the operating system saves
//   build_info()  compiler and C++ standard

#include <map>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros if the CPU does not have the leaf, which means "unsupported".
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// XCR0: the register states that the operating system has enabled. Valid only where CPUID.1:ECX.OSXSAVE is set.
unsigned enabled_states() {
  constexpr unsigned kOsxsave = 1u << 27;
  if (!(cpuid(1, 0).ecx & kOsxsave)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

std::map<std::string, bool> isa() {
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  const unsigned states = enabled_states();
  const bool ymm = (states & kYmm) == kYmm;
  const bool zmm = (states & kZmm) == kZmm;
  const bool tiles = (states & kTiles) == kTiles;
  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};
  const auto bit = [](unsigned word, int i) { return ((word >> i) & 1u) != 0; };
  // Bit positions: Intel SDM volume 2A, CPUID, leaf 07H.
  return {
      {"avx2", ymm && bit(leaf7.ebx, 5)},
      {"avx512f", zmm && bit(leaf7.ebx, 16)},
      {"avx512_bf16", zmm && bit(leaf7_1.eax, 5)},
      {"amx_bf16", tiles && bit(leaf7.edx, 22)},
      {"avx_ne_convert", ymm && bit(leaf7_1.edx, 5)},
  };
}

#else

std::map<std::string, bool> isa() {
  return {};
}

#endif

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  return {{"compiler", compiler}, {"cxx_standard", std::to_string(__cplusplus)}};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the host CPU and the compiler of this module.";
  m.def("isa", &isa, "Instruction sets by name, each with whether CPU and operating system let a program use it.");
  m.def("build_info", &build_info, "Compiler and C++ standard of this module.");
}
