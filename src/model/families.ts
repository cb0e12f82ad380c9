// The model families tp-run knows: how the config.json of each becomes a ModelConfig. A family is refused feature by
// feature: what would change the numbers and is not computed here is an error with the name of its key.

import { fail, listOf } from '../errors.js';
import type { ConfigOrigin, LayerConfig, ModelConfig, Rope } from './config.js';
import { Fields } from './fields.js';

type Family = (config: unknown, generation: unknown, origin: ConfigOrigin) => ModelConfig;

/** `model_type` of config.json -> reader. */
const FAMILIES: Readonly<Record<string, Family>> = { gemma4, gemma4_text: gemma4 };

/** The reader for a config; TP_CONFIG_UNSUPPORTED for a model_type that no family has. */
export function familyOf(config: unknown, { where }: ConfigOrigin): Family {
  const type = new Fields(where, config).required('model_type');
  const family = typeof type === 'string' && Object.hasOwn(FAMILIES, type) ? FAMILIES[type] : undefined;
  if (!family)
    throw fail(
      'TP_CONFIG_UNSUPPORTED',
      where,
      'model_type',
      type,
      `known are ${listOf(Object.keys(FAMILIES))}`,
    );
  return family;
}

// Bounds far above any model, low enough that sizes in elements stay exact integers.
const MAX_WIDTH = 2 ** 20;
const MAX_VOCAB = 2 ** 24;
const MAX_EXPERTS = 2 ** 10;
const MAX_HEADS = 2 ** 10;
const MAX_LAYERS = 2 ** 10;
const MAX_POSITION = 2 ** 30;

/** Gemma-4 with experts: the hub form nests the text model under `text_config`, the text-only form is flat. */
function gemma4(config: unknown, generation: unknown, origin: ConfigOrigin): ModelConfig {
  const top = new Fields(origin.where, config);
  const nested = top.required('model_type') === 'gemma4';
  const text = nested ? top.object('text_config') : top;
  if (nested) text.fixed('model_type', ['gemma4_text'], 'gemma4_text');

  for (const fields of nested ? [top, text] : [text]) {
    fields.fixed('tie_word_embeddings', [true], true);
    fields.fixed('quantization_config', [null], null);
  }
  text.fixed('enable_moe_block', [true], false);
  text.fixed('hidden_size_per_layer_input', [0], 256);
  text.fixed('num_kv_shared_layers', [0], 0);
  text.fixed('use_double_wide_mlp', [false], false);
  text.fixed('attention_bias', [false], false);
  text.fixed('hidden_activation', ['gelu_pytorch_tanh'], 'gelu_pytorch_tanh');
  // 'vision' lets image tokens look ahead; a text run has none.
  text.fixed('use_bidirectional_attention', [null, false, 'vision'], null);

  const vocabSize = text.integer('vocab_size', 2, MAX_VOCAB);
  const numExperts = text.integer('num_experts', 1, MAX_EXPERTS);
  const token = (key: string, absent: number) => text.integer(key, 0, vocabSize - 1, absent);
  const model: ModelConfig = {
    family: 'gemma4-moe',
    hiddenSize: text.integer('hidden_size', 1, MAX_WIDTH),
    vocabSize,
    layers: gemma4Layers(text),
    intermediateSize: text.integer('intermediate_size', 1, MAX_WIDTH),
    numExperts,
    topKExperts: text.integer('top_k_experts', 1, numExperts),
    moeIntermediateSize: text.integer('moe_intermediate_size', 1, MAX_WIDTH),
    rmsNormEps: text.number('rms_norm_eps', 0, 1, 1e-6),
    finalLogitSoftcap: text.has('final_logit_softcapping')
      ? text.number('final_logit_softcapping', 0, 1e6)
      : null,
    maxPositions: text.integer('max_position_embeddings', 1, MAX_POSITION),
    bosTokenId: token('bos_token_id', 2),
    eosTokenIds: [...new Set([top, text, generationFields(generation)].flatMap((f) => eosOf(f, vocabSize)))],
    padTokenId: token('pad_token_id', 0),
    tensorPrefix: nested ? 'model.language_model.' : 'model.',
  };
  for (const fields of nested ? [top, text] : [text]) refuseOthers(fields, origin);
  return model;
}

function gemma4Layers(text: Fields): LayerConfig[] {
  const count = text.integer('num_hidden_layers', 1, MAX_LAYERS);
  const kinds = text.required('layer_types');
  const known =
    Array.isArray(kinds) && kinds.every((k) => k === 'sliding_attention' || k === 'full_attention');
  if (!known || kinds.length !== count)
    text.refuse('layer_types', `list sliding_attention or full_attention for each of ${count} layers`, kinds);
  // Hugging Face silently turns the last layer into a full one; here the file has to say it.
  if (kinds.at(-1) !== 'full_attention') text.refuse('layer_types', 'end with full_attention', kinds.at(-1));

  const numHeads = text.integer('num_attention_heads', 1, MAX_HEADS);
  const window = text.integer('sliding_window', 1, MAX_POSITION);
  const kEqV = text.flag('attention_k_eq_v', false);
  const sizes = layerSizes(text, kinds, kEqV);
  const rope = text.object('rope_parameters');
  const ropes = new Map(
    [...new Set(kinds)].map((kind) => [kind, ropeOf(rope.object(kind), sizes[kinds.indexOf(kind)]!.headDim)]),
  );
  return kinds.map((kind, i): LayerConfig => {
    const { headDim, numKvHeads } = sizes[i]!;
    if (numHeads % numKvHeads)
      text.refuse('num_attention_heads', `be a multiple of layer ${i}'s ${numKvHeads} KV heads`, numHeads);
    const full = kind === 'full_attention';
    return {
      kind: full ? 'full' : 'sliding',
      numHeads,
      numKvHeads,
      headDim,
      window: full ? null : window,
      kEqV: full && kEqV,
      rope: ropes.get(kind)!,
    };
  });
}

interface LayerSizes {
  headDim: number;
  numKvHeads: number;
}

/** Head sizes of every layer. Full layers differ: `per_layer_config` says so by layer, `global_*` for all of them. */
function layerSizes(text: Fields, kinds: string[], kEqV: boolean): LayerSizes[] {
  const base: LayerSizes = sizesOf(text, { headDim: 0, numKvHeads: 0 });
  if (!text.has('per_layer_config')) {
    const heads = (key: string, absent?: number) => text.integer(key, 1, MAX_HEADS, absent);
    const global: LayerSizes = {
      headDim: headDimOf(text, 'global_head_dim'),
      // Only a full layer without v_proj has its own number of KV heads.
      numKvHeads: heads('num_global_key_value_heads', base.numKvHeads),
    };
    if (!kEqV) global.numKvHeads = base.numKvHeads;
    return kinds.map((kind) => (kind === 'full_attention' ? global : base));
  }
  text.fixed('global_head_dim', [null], null); // two answers to one question
  text.fixed('num_global_key_value_heads', [null], null);
  const perLayer = text.object('per_layer_config');
  const sizes = kinds.map((_, i) => {
    if (!perLayer.has(`${i}`)) return base;
    const layer = perLayer.object(`${i}`);
    const own = sizesOf(layer, base);
    for (const [key, value] of layer.unread())
      throw fail(
        'TP_CONFIG_UNSUPPORTED',
        layer.where,
        key,
        value,
        'only head_dim and num_key_value_heads may vary',
      );
    return own;
  });
  for (const [key] of perLayer.unread())
    perLayer.refuse(key, `name a layer from 0 to ${kinds.length - 1}`, key);
  kinds.forEach((kind, i) => {
    const first = sizes[kinds.indexOf(kind)]!;
    if (sizes[i]!.headDim !== first.headDim)
      perLayer.refuse(
        `${i}.head_dim`,
        `be ${first.headDim} like the other ${kind} layers`,
        sizes[i]!.headDim,
      );
  });
  return sizes;
}

function sizesOf(fields: Fields, absent: LayerSizes): LayerSizes {
  return {
    headDim: headDimOf(fields, 'head_dim', absent.headDim || undefined),
    numKvHeads: fields.integer('num_key_value_heads', 1, MAX_HEADS, absent.numKvHeads || undefined),
  };
}

/** RoPE turns pairs (i, i + headDim / 2), so a head has an even number of elements. */
function headDimOf(fields: Fields, key: string, absent?: number): number {
  const headDim = fields.integer(key, 2, MAX_HEADS * 8, absent);
  if (headDim % 2) fields.refuse(key, 'be even', headDim);
  return headDim;
}

function ropeOf(rope: Fields, headDim: number): Rope {
  const type = rope.raw('rope_type');
  if (type !== 'default' && type !== 'proportional')
    throw fail('TP_CONFIG_UNSUPPORTED', rope.where, 'rope_type', type, 'known are default and proportional');
  const theta = rope.number('rope_theta', 0, 1e12);
  rope.fixed('factor', [null, 1], null);
  let rotaryPairs = headDim / 2;
  if (type === 'default') rope.fixed('partial_rotary_factor', [null, 1], null);
  else rotaryPairs = Math.floor((rope.number('partial_rotary_factor', 0, 1, 1) * headDim) / 2);
  for (const [key, value] of rope.unread())
    throw fail('TP_CONFIG_UNSUPPORTED', rope.where, key, value, `${type} RoPE has no such parameter here`);
  return { type, theta, rotaryPairs };
}

function generationFields(generation: unknown): Fields {
  return new Fields('generation_config.json: ', generation ?? {});
}

/** Stop tokens: one id, a list, or none. */
function eosOf(fields: Fields, vocabSize: number): number[] {
  const ids = [fields.raw('eos_token_id') ?? []].flat();
  for (const id of ids)
    if (!Number.isSafeInteger(id) || (id as number) < 0 || (id as number) >= vocabSize)
      fields.refuse('eos_token_id', `hold token ids below ${vocabSize}`, id);
  return ids as number[];
}

/** Keys that say nothing about the text model's numbers at inference. */
const HARMLESS = new Set([
  'architectures',
  'attention_dropout',
  'audio_config',
  'chunk_size_feed_forward',
  'dtype',
  'id2label',
  'initializer_range',
  'is_encoder_decoder',
  'label2id',
  'output_attentions',
  'output_hidden_states',
  'problem_type',
  'return_dict',
  'torch_dtype',
  'transformers_version',
  'use_cache',
  'vision_config',
  'vision_soft_tokens_per_image',
  'vocab_size_per_layer_input',
  '_name_or_path',
  '_attn_implementation',
]);
const HARMLESS_PATTERN = /^(boi|eoi|boa|eoa|image|audio|video|bos|eos|pad)_token_(id|index)$/;

/** Words of keys that shape a forward pass. A key with one of them that we do not know may change the numbers. */
const SUSPICIOUS =
  /attn|attention|rope|rotary|position|norm|eps|scal|multipl|bias|cap|clip|clamp|expert|rout|moe|gat|head|layer|window|hidden|mlp|ffn|feed|intermediate|kv|key|value|query|act|embed|quant|compress|lora|adapter|residual|logit|sink|mask|dim|size|width|depth|theta|freq|temperature|shared|sparse/i;

function refuseOthers(fields: Fields, { refuse }: ConfigOrigin): void {
  for (const [key, value] of fields.unread()) {
    if (HARMLESS.has(key) || HARMLESS_PATTERN.test(key)) continue;
    if (refuse === 'all') throw fail('TP_CONFIG_KEY', fields.where, key);
    if (value !== null && SUSPICIOUS.test(key))
      throw fail(
        'TP_CONFIG_UNSUPPORTED',
        fields.where,
        key,
        value,
        'it may change the numbers and tp-run does not know it',
      );
  }
}
