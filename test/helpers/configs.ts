import fc from 'fast-check';
import type { LayerConfig, ModelConfig } from '../../src/model/config.js';

const power = (max: number) => fc.integer({ min: 0, max }).map((n) => 2 ** n);

const layer = (numHeads: number, groups: number): fc.Arbitrary<LayerConfig> =>
  fc.record({ full: fc.boolean(), kEqV: fc.boolean(), headDim: fc.constantFrom(2, 4, 6) }).map(
    ({ full, kEqV, headDim }): LayerConfig => ({
      kind: full ? 'full' : 'sliding',
      numHeads,
      numKvHeads: numHeads / groups,
      headDim,
      window: full ? null : 4,
      kEqV: full && kEqV,
      rope: { type: 'default', theta: 10000, rotaryPairs: headDim / 2 },
    }),
  );

/** Small models of any legal shape, most of them splittable. */
export const anyConfig: fc.Arbitrary<ModelConfig> = fc
  .record({
    kv: power(3),
    group: power(2),
    width: power(4),
    odd: fc.constantFrom(1, 1, 3),
    experts: power(2),
  })
  .chain(({ kv, group, width, odd, experts }) =>
    fc.record({
      family: fc.constant('gemma4-moe' as const),
      hiddenSize: fc.integer({ min: 1, max: 5 }),
      vocabSize: fc.constant(8 * width),
      layers: fc.array(fc.oneof(layer(kv * group, group), layer(kv * group, kv * group)), {
        minLength: 1,
        maxLength: 3,
      }),
      intermediateSize: fc.constant(width * odd),
      numExperts: fc.constant(experts),
      topKExperts: fc.integer({ min: 1, max: experts }),
      moeIntermediateSize: fc.constant(width),
      rmsNormEps: fc.constant(1e-6),
      finalLogitSoftcap: fc.constantFrom(30, null),
      maxPositions: fc.constant(64),
      bosTokenId: fc.constant(2),
      eosTokenIds: fc.constant([1]),
      padTokenId: fc.constant(0),
      tensorPrefix: fc.constant('model.'),
    }),
  );
