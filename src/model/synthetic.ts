// Weights without a checkpoint: element i of a tensor is a pure function of (seed, name, i), so every rank makes its
// own slice and all backends make the same bits. The native twin of `syntheticElement` is native/base/random.h.

import { createHash } from 'node:crypto';
import type { ModelConfig } from './config.js';

/** An element is `offset + v * scale`, v uniform over the odd integers in [-32767, 32767]. Both are bfloat16 values. */
export interface Scale {
  scale: number;
  offset: number;
}

/** Key of a tensor's random stream: 64 bits that depend on every bit of seed and name. */
export function syntheticKey(seed: number, name: string): [number, number] {
  const digest = createHash('sha256').update(`${seed}/${name}`).digest();
  return [digest.readUInt32LE(0), digest.readUInt32LE(4)];
}

/** Element `index` of the tensor with that key: a bfloat16 value. The definition that the native code must match. */
export function syntheticElement(index: number, [key0, key1]: readonly [number, number], s: Scale): number {
  const low = index >>> 0;
  const high = Math.floor(index / 2 ** 32) >>> 0;
  const hash = mix(mix((high + key1) >>> 0) ^ ((Math.imul(low, 0x9e3779b1) + key0) >>> 0));
  const v = 2 * (hash >>> 17) - 32767;
  // v has 15 bits and a scale 8, so the product is exact in float32: no rounding that a fused multiply-add could skip.
  return toBfloat16(Math.fround(s.offset + v * s.scale));
}

/** A 32-bit permutation with good avalanche (two rounds of xor-shift and multiply). */
function mix(x: number): number {
  x ^= x >>> 16;
  x = Math.imul(x, 0x7feb352d);
  x ^= x >>> 15;
  x = Math.imul(x, 0x846ca68b);
  return (x ^ (x >>> 16)) >>> 0;
}

/**
 * How large the elements of a tensor are. The aims: the residual stream stays finite at any depth, the choice of
 * experts is close to uniform (the most memory traffic), attention prefers some positions, and the next token depends
 * on the whole context and not just on the last token.
 */
export function syntheticScale(name: string, config: ModelConfig): Scale {
  const layer = config.layers[Number(/^layers\.(\d+)\./.exec(name)?.[1] ?? 0)]!;
  const { hiddenSize, intermediateSize, moeIntermediateSize } = config;
  switch (name.replace(/^layers\.\d+\./, '')) {
    case 'embed_tokens.weight':
      // Times sqrt(hidden) the embeddings enter the stream with 0.1, small beside a layer's output (about 1): were they
      // larger, the tied head would find the input token in the stream and repeat it.
      return spread(0.1 / Math.sqrt(hiddenSize));
    case 'norm.weight':
      // Logits of about 0.1 * 16: neither flat nor near the softcap.
      return spread(1, 16);
    case 'self_attn.q_norm.weight':
    case 'self_attn.k_norm.weight':
      // Scores are not divided by sqrt(headDim). With both norms at sqrt(3 / sqrt(headDim)) they have a deviation of 3.
      return spread(0.1 * Math.sqrt(3 / Math.sqrt(layer.headDim)), Math.sqrt(3 / Math.sqrt(layer.headDim)));
    case 'router.scale':
      // Undoes the router's own hidden^-0.5, so that its input has deviation 1 ...
      return spread(0.1 * Math.sqrt(hiddenSize), Math.sqrt(hiddenSize));
    case 'router.proj.weight':
      // ... and its logits 1.5: the top experts clearly lead, and every token has others.
      return spread(1.5 / Math.sqrt(hiddenSize));
    case 'layer_scalar':
      return spread(0.02, 1);
    // Projections keep the size of what they are given: deviation 1 / sqrt(inputs).
    case 'self_attn.o_proj.weight':
      return spread(1 / Math.sqrt(layer.numHeads * layer.headDim));
    case 'mlp.down_proj.weight':
      return spread(1 / Math.sqrt(intermediateSize));
    case 'experts.down_proj':
      return spread(1 / Math.sqrt(moeIntermediateSize));
    case 'self_attn.q_proj.weight':
    case 'self_attn.k_proj.weight':
    case 'self_attn.v_proj.weight':
    case 'mlp.gate_proj.weight':
    case 'mlp.up_proj.weight':
    case 'experts.gate_up_proj':
      return spread(1 / Math.sqrt(hiddenSize));
    // The other norms and router.per_expert_scale: around 1, uneven enough that a forgotten one shows.
    default:
      return spread(0.1, 1);
  }
}

/** Elements with standard deviation `deviation` around `offset`; the uniform v has 32767 / sqrt(3). */
function spread(deviation: number, offset = 0): Scale {
  return { scale: toBfloat16((deviation * Math.sqrt(3)) / 32767), offset: toBfloat16(offset) };
}

const bits = new DataView(new ArrayBuffer(4));

/** The nearest bfloat16 value, ties to even. */
function toBfloat16(value: number): number {
  bits.setFloat32(0, value);
  const raw = bits.getUint32(0);
  bits.setUint32(0, (raw + 0x7fff + ((raw >>> 16) & 1)) & 0xffff0000);
  return bits.getFloat32(0);
}
