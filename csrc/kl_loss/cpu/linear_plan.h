// How a call of linear_kl_loss on CPU goes over tokens and vocabulary, and what multiplies.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/cpu/gemm.h"
#include "common/types.h"

namespace minitron {

// store       for a chunk of tokens: the logits of the first stored_tiles are kept from the sums to the
//             gradient (4 GEMMs), those of the other tiles are made twice
// recompute   for a tile group: all chunks, no logits kept (6 GEMMs), so that a group's part of the head's
//             gradient is finished before the next group begins
// forward     logits are only reduced to the loss (2 GEMMs)
enum class Schedule { kStore, kRecompute, kForward };

// Whose GEMM multiplies the operands: libtorch's microkernels; or this library's own, plain vector code on
// any CPU, or of bf16 operands in tiles by AMX or AVX512_BF16; kPortableAmx and kPortableAvx512Bf16 are for
// tests, the same code with plain vectors in place of these instructions.
enum class Implementation { kLibtorch, kPortable, kAmx, kAvx512Bf16, kPortableAmx, kPortableAvx512Bf16 };

struct LinearPlan {
  Schedule schedule;
  int64_t chunk_tokens;  // whose operands are packed at a time
  int64_t tile;          // entries of the vocabulary that are one task
  int64_t tile_group;    // tiles whose dz is made, and whose head is packed, before dX takes them in
  int64_t stored_tiles;  // store: tiles whose logits are kept
  DType operands;        // what the GEMMs multiply
  Implementation implementation;

  // What suits caches and threads; no bit of a result depends on it.
  int64_t token_block;    // tokens whose logits are made and reduced together
  int64_t hidden_tokens;  // tokens and columns of dX that are one task
  int64_t hidden_columns;
  int64_t head_rows;   // rows of dW that are gathered in cache and written as one piece
  bool stream_logits;  // kept logits are written around the caches
  bool stream_head;    // so is dW
  int64_t threads;     // that multiply at the same time, at most: each has scratch memory

  // From `int[] plan` of the ops: these fields in this order, enumerators as their numbers.
  static LinearPlan of(const std::vector<int64_t>& numbers) {
    if (numbers.size() != 14) throw std::invalid_argument("plan must be the 14 numbers of LinearPlan");
    const int64_t schedule = numbers[0], operands = numbers[5], implementation = numbers[6];
    const LinearPlan plan{.schedule = Schedule(schedule),
                          .chunk_tokens = numbers[1],
                          .tile = numbers[2],
                          .tile_group = numbers[3],
                          .stored_tiles = numbers[4],
                          .operands = DType(operands),
                          .implementation = Implementation(implementation),
                          .token_block = numbers[7],
                          .hidden_tokens = numbers[8],
                          .hidden_columns = numbers[9],
                          .head_rows = numbers[10],
                          .stream_logits = numbers[11] != 0,
                          .stream_head = numbers[12] != 0,
                          .threads = numbers[13]};
    const bool known = schedule >= 0 && schedule <= int64_t(Schedule::kForward) && operands >= 0 &&
                       operands <= int64_t(DType::kBFloat16) && implementation >= 0 &&
                       implementation <= int64_t(Implementation::kPortableAvx512Bf16);
    // entries of the vocabulary are the K of dX, of which a tile of operands has 32
    const bool in_tiles = implementation >= int64_t(Implementation::kAmx);
    const bool fits = !in_tiles || (plan.tile >= 32 && plan.operands == DType::kBFloat16);
    const bool sizes = plan.chunk_tokens > 0 && plan.tile > 0 && plan.tile % 2 == 0 && plan.tile_group > 0 &&
                       plan.stored_tiles >= 0 && plan.head_rows > 0 && plan.head_rows % 16 == 0 &&
                       plan.threads > 0;
    bool blocks = true;
    for (int64_t block : {plan.token_block, plan.hidden_tokens, plan.hidden_columns}) {
      blocks = blocks && block > 0 && block % kPanel == 0;
    }
    if (!known || !sizes || !blocks || !fits ||
        (plan.schedule != Schedule::kStore && plan.stored_tiles > 0)) {
      throw std::invalid_argument("plan out of range");
    }
    return plan;
  }
};

}  // namespace minitron
