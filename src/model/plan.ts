// The forward pass as data: what one rank runs, step by step. Reads like the model's definition;
// native/engine/program turns it into calls, so a step is a stage that a backend may fuse, not a micro-op.

import type { EngineSpec, NativeLayer, NativeStep } from '../native.js';
import type { ModelConfig } from './config.js';
import {
  leavesOf,
  requireSplittable,
  type Slice,
  share,
  sliceOf,
  sliceSize,
  type TensorSplit,
  tensorSplits,
} from './shard.js';

/** A tensor of this rank: which part of the checkpoint it is, and the shape the ops see. */
export interface PlannedTensor {
  name: string;
  slice: Slice;
  shape: readonly number[];
}

export interface Plan {
  rank: number;
  size: number;
  model: EngineSpec['model'];
  layers: NativeLayer[];
  tensors: PlannedTensor[];
  steps: NativeStep[];
}

/** What rank `rank` of `size` runs and holds. Throws TP_SHARD_UNEVEN. */
export function makePlan(config: ModelConfig, rank: number, size: number): Plan {
  requireSplittable(config, size);
  return {
    rank,
    size,
    model: {
      hidden: config.hiddenSize,
      vocab: config.vocabSize,
      intermediate: config.intermediateSize / size,
      moeIntermediate: config.moeIntermediateSize / size,
      experts: config.numExperts,
      topK: config.topKExperts,
      eps: config.rmsNormEps,
      softcap: config.finalLogitSoftcap ?? 0,
      leaves: leavesOf(config),
      embedScale: Math.fround(Math.sqrt(config.hiddenSize)),
    },
    layers: config.layers.map((l): NativeLayer => {
      const [kvStart, kvStop] = share(l.numKvHeads, rank, size, true);
      return {
        heads: l.numHeads / size,
        kvHeads: kvStop - kvStart,
        headDim: l.headDim,
        window: l.window ?? 0,
        kEqV: l.kEqV,
        ropeTheta: l.rope.theta,
        rotaryPairs: l.rope.rotaryPairs,
      };
    }),
    tensors: tensorSplits(config).map((split) => {
      const slice = sliceOf(split, rank, size);
      return { name: split.name, slice, shape: localShape(split, sliceSize(slice)) };
    }),
    steps: [embed(), ...config.layers.flatMap((l, i) => decoderLayer(i, l.kEqV)), ...head()],
  };
}

function embed(): NativeStep {
  return { op: 'embed', stage: 'embed', layer: -1, weights: { table: 'embed_tokens.weight' } };
}

function decoderLayer(layer: number, kEqV: boolean): NativeStep[] {
  const w = (name: string) => `layers.${layer}.${name}`;
  const op = (stage: string, weights: Record<string, string>): NativeStep => ({
    op: stage,
    stage,
    layer,
    weights,
  });
  const sync = (stage: string, buffer: string): NativeStep => ({
    op: 'allReduce',
    stage,
    layer,
    weights: {},
    buffer,
  });
  return [
    op('qkv', {
      norm: w('input_layernorm.weight'),
      q: w('self_attn.q_proj.weight'),
      k: w('self_attn.k_proj.weight'),
      ...(kEqV ? {} : { v: w('self_attn.v_proj.weight') }),
      qNorm: w('self_attn.q_norm.weight'),
      kNorm: w('self_attn.k_norm.weight'),
    }),
    op('attention', {}),
    op('attnOut', { o: w('self_attn.o_proj.weight') }),
    sync('attnOut', 'attnSum'),
    op('route', {
      postAttentionNorm: w('post_attention_layernorm.weight'),
      denseNorm: w('pre_feedforward_layernorm.weight'),
      expertNorm: w('pre_feedforward_layernorm_2.weight'),
      scale: w('router.scale'),
      router: w('router.proj.weight'),
      perExpertScale: w('router.per_expert_scale'),
    }),
    op('gateUp', {
      gate: w('mlp.gate_proj.weight'),
      up: w('mlp.up_proj.weight'),
      expertGateUp: w('experts.gate_up_proj'),
    }),
    op('down', { down: w('mlp.down_proj.weight'), expertDown: w('experts.down_proj') }),
    sync('down', 'ffnSum'),
    op('ffnOut', {
      denseNorm: w('post_feedforward_layernorm_1.weight'),
      expertNorm: w('post_feedforward_layernorm_2.weight'),
      norm: w('post_feedforward_layernorm.weight'),
      layerScalar: w('layer_scalar'),
    }),
  ];
}

function head(): NativeStep[] {
  return [
    {
      op: 'logits',
      stage: 'logits',
      layer: -1,
      weights: { norm: 'norm.weight', table: 'embed_tokens.weight' },
    },
    { op: 'allGather', stage: 'logits', layer: -1, weights: {}, buffer: 'candidates' },
    { op: 'sample', stage: 'sample', layer: -1, weights: {} },
  ];
}

/** The shape that an op sees: the stored one with the split axis cut to this rank's part. */
function localShape(split: TensorSplit, elements: number): number[] {
  if (split.axis === null) return [...split.shape];
  const others = split.shape.reduce((n, d, i) => (i === split.storedAxis ? n : n * d), 1);
  return split.shape.map((d, i) => (i === split.storedAxis ? elements / others : d));
}
