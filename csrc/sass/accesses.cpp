// Loads, stores and updates of each kind of memory.

#include <algorithm>
#include <cstring>

#include "memory.h"

namespace sass {
namespace {

int bytes_of(Instruction& i) {
  if (i.take("128")) return 16;
  if (i.take("64") || i.take("U64") || i.take("S64")) return 8;
  if (i.take("U16") || i.take("S16") || i.take("16")) return 2;
  if (i.take("U8") || i.take("S8") || i.take("8")) return 1;
  return 4;
}

// ---- loads and stores ----

void run_global_load(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const Operand& place = i.operands[i.number];
  const Addresses a = addresses_of(w, i, place, w.exec, true);
  Bytes bytes;
  const bool given = load_global(w, i, a.at, w.exec, i.size, bytes);
  Event& e = w.event(i);
  note_global(w, e, a.at, w.exec, i.size, true, false);
  note_banks(w, e, a.at, w.exec, i.size);
  if (given)
    put_bytes(w, i, i.operands[0], i.size, bytes);
  else
    w.forget(i, w.exec);
}

void run_global_store(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const Addresses a = addresses_of(w, i, i.operands[0], w.exec, true);
  Bytes bytes;
  take_bytes(w, i, i.operands[1], i.size, bytes);
  store_global(w, i, a.at, w.exec, i.size, bytes);
  Event& e = w.event(i);
  note_global(w, e, a.at, w.exec, i.size, false, true);
  note_banks(w, e, a.at, w.exec, i.size);
}

void run_shared_load(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const Addresses a = addresses_of(w, i, i.operands[1], w.exec, false);
  Bytes bytes;
  load_shared(w, i, a.at, w.exec, i.size, bytes);
  Event& e = w.event(i);
  e.address = a.at[w.leader()];
  e.bytes = static_cast<uint32_t>(i.size * __builtin_popcount(w.exec));
  note_banks(w, e, a.at, w.exec, i.size);
  put_bytes(w, i, i.operands[0], i.size, bytes);
}

void run_shared_store(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const Addresses a = addresses_of(w, i, i.operands[0], w.exec, false);
  Bytes bytes;
  take_bytes(w, i, i.operands[1], i.size, bytes);
  store_shared(w, i, a.at, w.exec, i.size, bytes);
  Event& e = w.event(i);
  e.address = a.at[w.leader()];
  e.bytes = static_cast<uint32_t>(i.size * __builtin_popcount(w.exec));
  note_banks(w, e, a.at, w.exec, i.size);
}

bool find_place(Instruction& i) {
  for (size_t n = 0; n < i.operands.size(); ++n)
    if (i.operands[n].kind == Kind::kMemory) {
      i.number = static_cast<int64_t>(n);
      return true;
    }
  return false;
}

bool decode_global_load(Instruction& i) {
  i.strict = true;
  i.is_signed = i.opcode.find(".S8") != std::string::npos || i.opcode.find(".S16") != std::string::npos;
  i.size = bytes_of(i);
  i.modifiers.clear();  // caches, scopes and hints change no address
  i.run = run_global_load;
  return find_place(i);
}

bool decode_global_store(Instruction& i) {
  i.strict = true;
  i.size = bytes_of(i);
  i.modifiers.clear();
  i.run = run_global_store;
  return i.operands.size() >= 2;
}

bool decode_shared_load(Instruction& i) {
  i.strict = true;
  i.is_signed = i.opcode.find(".S8") != std::string::npos || i.opcode.find(".S16") != std::string::npos;
  i.size = bytes_of(i);
  i.take("U");
  i.run = run_shared_load;
  return i.operands.size() == 2;
}

bool decode_shared_store(Instruction& i) {
  i.strict = true;
  i.size = bytes_of(i);
  i.run = run_shared_store;
  return i.operands.size() == 2;
}

// ---- matrices ----

// Lane 8 m + r names row r of matrix m. What is loaded goes to products, and is not followed.
void run_matrices(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const bool store = i.name == "STSM";
  const uint32_t rows = w.exec & (i.size == 4 ? kAll : (1u << 8 * i.size) - 1);
  const Addresses a = addresses_of(w, i, i.operands[store ? 0 : 1], rows, false);
  constexpr int kRow = 16;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(rows >> lane & 1)) continue;
    check_shared(w, i, a.at[lane], kRow);
    if (store) std::memset(w.block->shared_known.data() + a.at[lane], 0, kRow);
  }
  Event& e = w.event(i);
  e.address = rows ? a.at[__builtin_ctz(rows)] : 0;
  e.bytes = static_cast<uint32_t>(kRow * __builtin_popcount(rows));
  note_banks(w, e, a.at, rows, kRow);
  if (!store) w.forget(i, w.exec);
}

bool decode_matrices(Instruction& i) {
  i.strict = true;
  i.size = i.take("4") ? 4 : i.take("2") ? 2 : 1;
  i.take("16");
  if (!i.take("M88")) i.take("MT88");
  i.run = run_matrices;
  return i.operands.size() == 2;
}

// ---- cp.async ----

void run_async_copy(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  uint32_t reading = w.exec;
  if (i.operands.size() > 2) {
    const Mask read = w.predicate(i.operands[2]);
    if (w.exec & ~read.known) w.fail(i, "has an unknown predicate");
    reading &= read.v;
  }
  const Addresses to = addresses_of(w, i, i.operands[0], w.exec, false);
  Bytes bytes;
  std::memset(&bytes.data, 0, sizeof(bytes.data));
  std::memset(&bytes.known, 1, sizeof(bytes.known));
  Event& e = w.event(i);
  if (reading != 0) {
    const Addresses from = addresses_of(w, i, i.operands[1], reading, true);
    load_global(w, i, from.at, reading, i.size, bytes);
    note_global(w, e, from.at, reading, i.size, true, false);
  }
  store_shared(w, i, to.at, w.exec, i.size, bytes);
  e.value = static_cast<int64_t>(to.at[w.leader()]);
  note_banks(w, e, to.at, w.exec, i.size);
}

bool decode_async_copy(Instruction& i) {
  i.strict = true;
  i.size = bytes_of(i);
  i.modifiers.clear();
  i.run = run_async_copy;
  return i.operands.size() >= 2 && (i.operands.size() == 2 || i.operands[2].kind == Kind::kP);
}

// ---- updates ----

uint64_t updated(int form, uint64_t old, uint64_t value, bool is_signed, int bytes) {
  const auto wide = [&](uint64_t x) {
    return is_signed && bytes == 4 ? static_cast<int64_t>(static_cast<int32_t>(x)) : static_cast<int64_t>(x);
  };
  const bool below = is_signed ? wide(value) < wide(old) : value < old;
  switch (form) {
    case 0:
      return old + value;
    case 1:
      return below ? value : old;
    case 2:
      return below ? old : value;
    case 3:
      return old & value;
    case 4:
      return old | value;
    case 5:
      return old ^ value;
    default:
      return value;  // exchange
  }
}

void run_update(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const bool global = i.name != "ATOMS";
  const auto place = static_cast<size_t>(i.number);
  const Addresses a = addresses_of(w, i, i.operands[place], w.exec, global);
  Bytes given, old;
  take_bytes(w, i, i.operands[place + 1], i.size, given);
  for (int lane = 0; lane < kWarp; ++lane) {  // one after another, as lanes may name one place
    const uint32_t bit = w.exec & 1u << lane;
    if (bit == 0) continue;
    if (global)
      load_global(w, i, a.at, bit, i.size, old);
    else
      load_shared(w, i, a.at, bit, i.size, old);
    Bytes fresh = old;
    bool known = i.form >= 0;
    for (int n = 0; n < i.size; ++n) known &= given.known[lane][n] && (old.known[lane][n] || i.form == 6);
    uint64_t before = 0, value = 0;
    std::memcpy(&before, old.data[lane], i.size);
    std::memcpy(&value, given.data[lane], i.size);
    const uint64_t after = known ? updated(i.form, before, value, i.is_signed, i.size) : 0;
    std::memcpy(fresh.data[lane], &after, i.size);
    std::memset(fresh.known[lane], known, i.size);
    global ? store_global(w, i, a.at, bit, i.size, fresh) : store_shared(w, i, a.at, bit, i.size, fresh);
  }
  Event& e = w.event(i);
  if (global) {
    note_global(w, e, a.at, w.exec, i.size, true, true);
  } else {
    e.address = a.at[w.leader()];
    e.bytes = static_cast<uint32_t>(i.size * __builtin_popcount(w.exec));
  }
  note_banks(w, e, a.at, w.exec, i.size);
  if (i.results > 0) {
    put_bytes(w, i, i.operands[i.results - 1], i.size, old);
    if (i.results > 1) w.put(i.operands[0], Mask{0, 0});
  }
}

bool decode_update(Instruction& i) {
  static const char* const kForms[] = {"ADD", "MIN", "MAX", "AND", "OR", "XOR", "EXCH"};
  i.strict = true;
  i.form = -1;
  for (int n = 0; n < 7; ++n)
    if (i.take(kForms[n])) i.form = n;
  i.is_signed = i.opcode.find(".S32") != std::string::npos || i.opcode.find(".S64") != std::string::npos;
  i.size = i.opcode.find("64") != std::string::npos ? 8 : 4;
  // Sums of floating point and comparisons with an expected value leave what they wrote unknown.
  if (i.opcode.find(".F") != std::string::npos || i.opcode.find("BF16") != std::string::npos) i.form = -1;
  i.modifiers.clear();
  i.run = run_update;
  return find_place(i) && static_cast<size_t>(i.number) + 1 < i.operands.size();
}

// ---- local memory ----

void run_local(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  const bool store = i.name == "STL";
  const Addresses a = addresses_of(w, i, i.operands[store ? 0 : 1], w.exec, false);
  Bytes bytes;
  if (store) take_bytes(w, i, i.operands[1], i.size, bytes);
  uint64_t line[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.exec >> lane & 1)) continue;
    const uint64_t place = a.at[lane], end = place + i.size;
    const size_t per_lane = w.local.size() / kWarp;
    if (end > per_lane) {  // grown as it is used; a lane's bytes stay together
      const size_t more = (end + 255) / 256 * 256;
      std::vector<uint8_t> data(more * kWarp), known(more * kWarp);
      for (int n = 0; n < kWarp; ++n) {
        std::copy_n(w.local.data() + n * per_lane, per_lane, data.data() + n * more);
        std::copy_n(w.local_known.data() + n * per_lane, per_lane, known.data() + n * more);
      }
      w.local = std::move(data);
      w.local_known = std::move(known);
    }
    const size_t at = lane * (w.local.size() / kWarp) + place;
    if (store) {
      std::memcpy(w.local.data() + at, bytes.data[lane], i.size);
      std::memcpy(w.local_known.data() + at, bytes.known[lane], i.size);
    } else {
      std::memcpy(bytes.data[lane], w.local.data() + at, i.size);
      std::memcpy(bytes.known[lane], w.local_known.data() + at, i.size);
    }
    // The words of a warp's lanes lie side by side, so that an access at one place is a line.
    const uint64_t warp = static_cast<uint64_t>(w.block->record.index) * 64 + w.number;
    line[lane] = kLocalWindow + (warp << 24) + place * kWarp + lane * 4;
  }
  Event& e = w.event(i);
  for (int word = 0; word < std::max(1, i.size / 4); ++word) {
    Event part{};
    note_global(w, part, line, w.exec, 4, !store, store);
    e.sectors += part.sectors;
    e.bytes += part.bytes;
    e.address = part.address;
    for (uint64_t& at : line) at += 4 * kWarp;
  }
  if (!store) put_bytes(w, i, i.operands[0], i.size, bytes);
}

bool decode_local(Instruction& i) {
  i.strict = true;
  i.is_signed = false;
  i.size = bytes_of(i);
  i.modifiers.clear();
  i.run = run_local;
  return i.operands.size() == 2;
}

// ---- constants ----

void run_constant(Warp& w, const Instruction& i) {
  const Operand& o = i.source(0);
  for (int part = 0; part < std::max(1, i.size / 4); ++part) {
    Vec out = Vec::of(0);
    if (o.base < 0 && o.uniform < 0 && i.size >= 4) {
      out = o.value[0];
      if (part > 0 && !constant(*w.launch, o.bank, o.offset + 4 * part, 4, out.v[0])) out.known = 0;
      if (part > 0) {
        const uint32_t known = out.known;
        out = Vec::of(out.v[0]);
        out.known = known;
      }
    } else {
      const Vec* index = o.base >= 0 ? &w.r[o.base] : o.uniform >= 0 ? &w.ur[o.uniform] : nullptr;
      const int size = std::min(i.size, 4);
      out.known = index == nullptr ? kAll : index->known;
      for (int lane = 0; lane < kWarp; ++lane) {
        const int64_t at = (index ? static_cast<int32_t>(index->v[lane]) : 0) + o.offset + 4 * part;
        if (!(out.known >> lane & 1) || !constant(*w.launch, o.bank, at, size, out.v[lane])) out.known &= ~(1u << lane);
        if (i.is_signed && size == 1) out.v[lane] = static_cast<uint32_t>(static_cast<int8_t>(out.v[lane]));
        if (i.is_signed && size == 2) out.v[lane] = static_cast<uint32_t>(static_cast<int16_t>(out.v[lane]));
      }
    }
    w.put(i.operands[0], out, part);
  }
}

bool decode_constant(Instruction& i) {
  i.is_signed = i.opcode.find(".S8") != std::string::npos || i.opcode.find(".S16") != std::string::npos;
  i.size = bytes_of(i);
  i.run = run_constant;
  return i.sources() == 1 && i.source(0).kind == Kind::kConstant;
}

}  // namespace

const std::map<std::string, Decoder>& memory_decoders() {
  static const std::map<std::string, Decoder> all = {
      {"LDG", decode_global_load}, {"LD", decode_global_load},  {"STG", decode_global_store},
      {"ST", decode_global_store}, {"LDS", decode_shared_load}, {"STS", decode_shared_store},
      {"LDSM", decode_matrices},   {"STSM", decode_matrices},   {"LDGSTS", decode_async_copy},
      {"ATOMG", decode_update},    {"ATOM", decode_update},     {"RED", decode_update},
      {"REDG", decode_update},     {"ATOMS", decode_update},    {"LDL", decode_local},
      {"STL", decode_local},       {"LDC", decode_constant},    {"ULDC", decode_constant},
  };
  return all;
}

}  // namespace sass
