// The model's shape, read from a Hugging Face config.json (both forms) into one flat, checked object.

/** One decoder layer. Full-model sizes: sharding happens in plan.ts. */
export interface LayerConfig {
  kind: 'sliding' | 'full';
  numHeads: number;
  numKvHeads: number;
  headDim: number;
  /** Positions a query sees, its own included; null = all. */
  window: number | null;
  /** v is the raw k projection (no v_proj in the checkpoint). */
  kEqV: boolean;
  rope: Rope;
}

export interface Rope {
  type: 'default' | 'proportional';
  theta: number;
  /** Pairs (i, i + headDim/2), i < rotaryPairs, that rotate; the others pass through. */
  rotaryPairs: number;
}

export interface ModelConfig {
  family: 'gemma4-moe';
  hiddenSize: number;
  vocabSize: number;
  layers: LayerConfig[];
  intermediateSize: number;
  numExperts: number;
  topKExperts: number;
  moeIntermediateSize: number;
  rmsNormEps: number;
  /** logits = cap * tanh(logits / cap); null = none. */
  finalLogitSoftcap: number | null;
  maxPositions: number;
  bosTokenId: number;
  /** Union of config.json and generation_config.json. */
  eosTokenIds: number[];
  padTokenId: number;
  /** Checkpoint prefix of the text tensors: `model.` or `model.language_model.`. */
  tensorPrefix: string;
}
