import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { parseModelConfig, readModelConfig } from '../../src/model/config.js';
import { readConfigFile } from '../../src/model/configfile.js';
import type { JsonObject } from '../../src/model/json.js';

const fixture = (name: string) => join(import.meta.dirname, '..', 'fixtures', name);
const flat = (): JsonObject => JSON.parse(readFileSync(join(fixture('tiny-moe'), 'config.json'), 'utf8'));
const hub = (): JsonObject & { text_config: JsonObject } =>
  JSON.parse(readFileSync(join(fixture('tiny-moe-hub'), 'config.json'), 'utf8'));

describe('a checkpoint config', () => {
  it('in the flat form gives full layers the sizes of per_layer_config', () => {
    const config = readModelConfig(fixture('tiny-moe'));
    expect(config).toMatchObject({
      family: 'gemma4-moe',
      hiddenSize: 64,
      vocabSize: 512,
      intermediateSize: 96,
      numExperts: 16,
      topKExperts: 4,
      moeIntermediateSize: 32,
      rmsNormEps: 1e-6,
      finalLogitSoftcap: 30,
      maxPositions: 4096,
      bosTokenId: 2,
      eosTokenIds: [1],
      padTokenId: 0,
      tensorPrefix: 'model.',
    });
    expect(config.layers).toHaveLength(6);
    expect(config.layers[0]).toEqual({
      kind: 'sliding',
      numHeads: 4,
      numKvHeads: 2,
      headDim: 32,
      window: 16,
      kEqV: false,
      rope: { type: 'default', theta: 10000, rotaryPairs: 16 },
    });
    expect(config.layers[5]).toEqual({
      kind: 'full',
      numHeads: 4,
      numKvHeads: 1,
      headDim: 64,
      window: null,
      kEqV: true,
      rope: { type: 'proportional', theta: 1e6, rotaryPairs: 8 },
    });
  });

  it('in the hub form gives full layers the global sizes and unites the stop tokens of both files', () => {
    const config = readModelConfig(fixture('tiny-moe-hub'));
    expect(config.tensorPrefix).toBe('model.language_model.');
    expect(config.eosTokenIds).toEqual([1, 6]);
    expect(config.layers.map((l) => [l.kind, l.headDim, l.numKvHeads])).toEqual(
      Array.from({ length: 12 }, (_, i) => (i % 6 === 5 ? ['full', 32, 2] : ['sliding', 16, 4])),
    );
  });

  it('unites stop tokens of the outer config, the text config and the generation config', () => {
    const config = { ...hub(), eos_token_id: [1, 106] };
    expect(parseModelConfig(config, { eos_token_id: [1, 106, 50] }).eosTokenIds).toEqual([1, 106, 50]);
  });

  it('keeps v_proj and the plain number of KV heads on full layers when attention_k_eq_v is off', () => {
    const config = hub();
    config.text_config.attention_k_eq_v = false;
    const full = parseModelConfig(config).layers[5]!;
    expect([full.kEqV, full.numKvHeads]).toEqual([false, 4]);
  });

  it('may carry keys that do not concern the numbers', () => {
    const config = { ...flat(), my_note: 'trained on a Tuesday', vision_config: {}, use_cache: false };
    expect(parseModelConfig(config)).toEqual(parseModelConfig(flat()));
  });

  it('accepts every form of "no bidirectional attention in text"', () => {
    for (const value of [null, false, 'vision'])
      expect(parseModelConfig({ ...flat(), use_bidirectional_attention: value })).toEqual(
        parseModelConfig(flat()),
      );
  });
});

const rope = (type: string, change: JsonObject) => ({
  rope_parameters: {
    ...(flat().rope_parameters as JsonObject),
    [type]: { ...((flat().rope_parameters as JsonObject)[type] as JsonObject), ...change },
  },
});
const kinds = (last: string) => [...Array(5).fill('sliding_attention'), last];

describe.each<[what: string, change: JsonObject, code: string, text: RegExp]>([
  ['another model_type', { model_type: 'llama' }, 'TP_CONFIG_UNSUPPORTED', /model_type = "llama"/],
  [
    'a model_type that is a name of every object',
    { model_type: 'toString' },
    'TP_CONFIG_UNSUPPORTED',
    /toString/,
  ],
  ['a dense-only model', { enable_moe_block: false }, 'TP_CONFIG_UNSUPPORTED', /enable_moe_block = false/],
  [
    'no word on experts',
    { enable_moe_block: undefined },
    'TP_CONFIG_UNSUPPORTED',
    /leaving it out means false/,
  ],
  [
    'per-layer inputs',
    { hidden_size_per_layer_input: 256 },
    'TP_CONFIG_UNSUPPORTED',
    /hidden_size_per_layer_input = 256/,
  ],
  [
    'per-layer inputs by default',
    { hidden_size_per_layer_input: undefined },
    'TP_CONFIG_UNSUPPORTED',
    /means 256/,
  ],
  [
    'KV sharing between layers',
    { num_kv_shared_layers: 2 },
    'TP_CONFIG_UNSUPPORTED',
    /num_kv_shared_layers = 2/,
  ],
  ['bidirectional attention', { use_bidirectional_attention: 'all' }, 'TP_CONFIG_UNSUPPORTED', /"all"/],
  ['attention biases', { attention_bias: true }, 'TP_CONFIG_UNSUPPORTED', /attention_bias = true/],
  [
    'another activation',
    { hidden_activation: 'silu' },
    'TP_CONFIG_UNSUPPORTED',
    /hidden_activation = "silu"/,
  ],
  ['a double-wide MLP', { use_double_wide_mlp: true }, 'TP_CONFIG_UNSUPPORTED', /use_double_wide_mlp/],
  ['an untied head', { tie_word_embeddings: false }, 'TP_CONFIG_UNSUPPORTED', /tie_word_embeddings = false/],
  ['quantized weights', { quantization_config: { bits: 4 } }, 'TP_CONFIG_UNSUPPORTED', /quantization_config/],
  [
    'an unknown RoPE type',
    rope('full_attention', { rope_type: 'yarn' }),
    'TP_CONFIG_UNSUPPORTED',
    /rope_type = "yarn"/,
  ],
  [
    'a RoPE factor',
    rope('full_attention', { factor: 8 }),
    'TP_CONFIG_UNSUPPORTED',
    /full_attention.factor = 8/,
  ],
  [
    'a RoPE parameter nobody knows',
    rope('sliding_attention', { beta: 1 }),
    'TP_CONFIG_UNSUPPORTED',
    /beta = 1/,
  ],
  [
    'partial rotation of default RoPE',
    rope('sliding_attention', { partial_rotary_factor: 0.5 }),
    'TP_CONFIG_UNSUPPORTED',
    /partial_rotary_factor = 0.5/,
  ],
  [
    'an attention softcap',
    { attn_logit_softcapping: 50 },
    'TP_CONFIG_UNSUPPORTED',
    /attn_logit_softcapping = 50/,
  ],
  [
    'another attention scale',
    { query_pre_attn_scalar: 256 },
    'TP_CONFIG_UNSUPPORTED',
    /query_pre_attn_scalar/,
  ],
  ['a router option', { norm_topk_prob_experts: false }, 'TP_CONFIG_UNSUPPORTED', /norm_topk_prob_experts/],
  [
    'another size by layer',
    { per_layer_config: { 5: { head_dim: 64, intermediate_size: 8 } } },
    'TP_CONFIG_UNSUPPORTED',
    /per_layer_config.5.intermediate_size = 8/,
  ],
  ['two answers on head_dim', { global_head_dim: 64 }, 'TP_CONFIG_UNSUPPORTED', /global_head_dim = 64/],
  [
    'a layer that is not there',
    { per_layer_config: { 9: { head_dim: 64 } } },
    'TP_CONFIG_FIELD',
    /layer from 0 to 5, found "9"/,
  ],
  [
    'head_dim that varies within a kind',
    { per_layer_config: { 1: { head_dim: 64 } } },
    'TP_CONFIG_FIELD',
    /be 32 like the other/,
  ],
  [
    'a sliding last layer',
    { layer_types: kinds('sliding_attention') },
    'TP_CONFIG_FIELD',
    /layer_types must end with full/,
  ],
  [
    'an unknown layer type',
    { layer_types: kinds('linear_attention') },
    'TP_CONFIG_FIELD',
    /layer_types must list/,
  ],
  ['too few layer types', { layer_types: ['full_attention'] }, 'TP_CONFIG_FIELD', /each of 6 layers/],
  ['an odd head', { head_dim: 33 }, 'TP_CONFIG_FIELD', /head_dim must be even, found 33/],
  [
    'heads that KV heads do not divide',
    { num_attention_heads: 5 },
    'TP_CONFIG_FIELD',
    /multiple of layer 0's 2 KV heads, found 5/,
  ],
  [
    'more experts per token than experts',
    { top_k_experts: 17 },
    'TP_CONFIG_FIELD',
    /top_k_experts must be a whole number from 1 to 16, found 17/,
  ],
  ['a fraction', { hidden_size: 64.5 }, 'TP_CONFIG_FIELD', /hidden_size .* found 64.5/],
  ['a negative size', { intermediate_size: -96 }, 'TP_CONFIG_FIELD', /found -96/],
  ['a number as text', { vocab_size: '512' }, 'TP_CONFIG_FIELD', /found "512"/],
  ['a size beyond reason', { moe_intermediate_size: 1e15 }, 'TP_CONFIG_FIELD', /moe_intermediate_size/],
  ['a missing size', { hidden_size: undefined }, 'TP_CONFIG_FIELD', /hidden_size .* found nothing/],
  [
    'a stop token outside the vocabulary',
    { eos_token_id: [1, 512] },
    'TP_CONFIG_FIELD',
    /eos_token_id .* found 512/,
  ],
  ['an epsilon of zero', { rms_norm_eps: 0 }, 'TP_CONFIG_FIELD', /rms_norm_eps/],
])('a config with %s', (_, change, code, text) => {
  it('is refused by name', () => {
    const config = JSON.parse(JSON.stringify({ ...flat(), ...change }));
    expect(() => parseModelConfig(config)).toThrow(expect.objectContaining({ code, exitCode: 2 }));
    expect(() => parseModelConfig(config)).toThrow(text);
  });
});

describe('a file of configs/', () => {
  const file = (json: unknown): string => {
    const path = join(mkdtempSync(join(tmpdir(), 'tp-run-')), 'shape.json');
    writeFileSync(path, typeof json === 'string' ? json : JSON.stringify(json));
    return path;
  };
  const shipped = (name: string) => join(import.meta.dirname, '..', '..', 'configs', `${name}.json`);

  it('holds the real shape: 25.2 billion parameters in 657 text tensors', async () => {
    const { tensorSplits } = await import('../../src/model/shard.js');
    const { config } = readConfigFile(shipped('gemma-4-26b-a4b'));
    const sizes = tensorSplits(config).map((t) => t.shape.reduce((n, d) => n * d, 1));
    expect(sizes).toHaveLength(657);
    expect(sizes.reduce((n, d) => n + d)).toBe(25_233_141_790);
    expect(config.layers.flatMap((l, i) => (l.kind === 'full' ? [i] : []))).toEqual([5, 11, 17, 23, 29]);
  });

  it('holds three layers of the same width', () => {
    const whole = readConfigFile(shipped('gemma-4-26b-a4b')).config;
    const { config } = readConfigFile(shipped('gemma-4-26b-a4b-3layers'));
    expect(config).toEqual({ ...whole, layers: [whole.layers[0], whole.layers[1], whole.layers[5]] });
  });

  it('holds six layers of the same width, one of them full', () => {
    const whole = readConfigFile(shipped('gemma-4-26b-a4b')).config;
    const { config } = readConfigFile(shipped('gemma-4-26b-a4b-6layers'));
    expect(config).toEqual({ ...whole, layers: whole.layers.slice(0, 6) });
  });

  it('holds a tiny model that splits over 1, 2, 4 and 8 ranks', async () => {
    const { leavesOf } = await import('../../src/model/shard.js');
    expect(leavesOf(readConfigFile(shipped('tiny')).config)).toBe(8);
  });

  it.each<[string, unknown, string, RegExp]>([
    ['beside config', { config: flat(), seed: 0, sede: 1 }, 'TP_CONFIG_KEY', /: sede is not a known key/],
    ['in config', { config: { ...flat(), my_note: '' }, seed: 0 }, 'TP_CONFIG_KEY', /config.my_note/],
    [
      'in rope_parameters',
      { config: { ...flat(), ...rope('sliding_attention', { note: 1 }) }, seed: 0 },
      'TP_CONFIG_UNSUPPORTED',
      /sliding_attention.note/,
    ],
    [
      'in options',
      { config: flat(), seed: 0, options: { 'max-token': 4 } },
      'TP_CONFIG_KEY',
      /options.max-token is/,
    ],
  ])('with an unknown key %s is an error', (_, json, code, text) => {
    expect(() => readConfigFile(file(json))).toThrow(expect.objectContaining({ code, exitCode: 2 }));
    expect(() => readConfigFile(file(json))).toThrow(text);
  });

  it.each<[string, unknown, string]>([
    ['a wrong option value', { config: flat(), seed: 0, options: { 'max-tokens': -4 } }, 'TP_CONFIG_VALUE'],
    ['a negative seed', { config: flat(), seed: -1 }, 'TP_CONFIG_FIELD'],
    ['no config', { seed: 0 }, 'TP_CONFIG_FIELD'],
    ['no JSON', '{"config": ', 'TP_JSON'],
    ['a key twice', '{"seed": 0, "seed": 1, "config": {}}', 'TP_JSON'],
    ['a list', [], 'TP_CONFIG_FIELD'],
  ])('with %s is an error', (_, json, code) => {
    expect(() => readConfigFile(file(json))).toThrow(expect.objectContaining({ code, exitCode: 2 }));
  });

  it('that is not there is an error', () => {
    expect(() => readConfigFile('/nowhere/shape.json')).toThrow(
      expect.objectContaining({ code: 'TP_FILE_UNREADABLE', exitCode: 2 }),
    );
  });
});
