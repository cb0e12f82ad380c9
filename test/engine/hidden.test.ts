// Parity with Hugging Face transformers inside the model: the stream after every layer and what the router chose.

import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { Collective } from '../../src/comm/collective.js';
import { fixture, golden as readGolden } from '../helpers/fixture.js';
import { openGolden, type Rank } from '../helpers/ranks.js';
import { readTensors } from '../helpers/tensors.js';

const BOUND = 1e-3;

/** What one rank held while it read a prompt, layer by layer. */
interface Layers {
  hidden: Float32Array[];
  routeIndex: number[][];
  routeWeight: Float32Array[];
}

/** Looks into the engine at every sync point: after attnOut of layer k the stream is still the output of layer k - 1. */
function observe(rank: Rank): Layers {
  const layers: Layers = { hidden: [], routeIndex: [], routeWeight: [] };
  const { engine, collective } = rank;
  const syncs = rank.plan.steps.filter((s) => s.op === 'allReduce');
  let at = 0;
  rank.collective = {
    ...collective,
    allReduce: (buffer) => {
      if (syncs[at++]!.stage === 'attnOut') {
        layers.hidden.push(engine.readBuffer('hidden'));
      } else {
        layers.routeIndex.push([...engine.readBuffer('routeIndex')]);
        layers.routeWeight.push(engine.readBuffer('routeWeight'));
      }
      return collective.allReduce(buffer);
    },
  } satisfies Collective;
  return layers;
}

function maxDifference(a: Float32Array, b: Float32Array): number {
  expect(a.length).toBe(b.length);
  return a.reduce((max, x, i) => Math.max(max, Math.abs(x - b[i]!)), 0); // NaN stays
}

describe.each([
  { name: 'tiny-moe', sizes: [1, 2, 4] },
  { name: 'tiny-moe-hub', sizes: [1, 2, 4, 8] },
])('$name', ({ name, sizes }) => {
  const dir = fixture(name);
  const { prompts } = readGolden(name);
  const tensors = readTensors(join(dir, 'golden.safetensors'));

  it.each(sizes)(
    'holds the stream and the routing of transformers after every layer at tp=%i',
    async (size) => {
      let worst = { hidden: 0, routeWeight: 0 };
      for (const [i, promptIds] of prompts.entries()) {
        const group = await openGolden(dir, { size, collective: 'host' });
        const observed = group.ranks.map(observe);
        await group.run({
          kind: 'score',
          sequences: [{ promptIds, maxTokens: 0, sequence: i }],
          keepLogits: false,
          fault: null,
        });
        // After the last layer transformers keeps the stream behind the final norm.
        for (const [rank, { engine }] of group.ranks.entries())
          observed[rank]!.hidden.push(engine.readBuffer('normed'));
        group.close();

        const hidden = tensors.float32(`fp32.${i}.hidden`);
        const routeIndex = tensors.int32(`fp32.${i}.route_index`);
        const routeWeight = tensors.float32(`fp32.${i}.route_weight`);
        const layers = tensors.shape(`fp32.${i}.route_index`)[0]!;
        for (const rank of observed) {
          expect(rank.hidden).toHaveLength(layers + 1);
          expect(rank.routeIndex.flat()).toEqual([...routeIndex]);
          const all = (parts: Float32Array[]) => Float32Array.from(parts.flatMap((part) => [...part]));
          worst = {
            hidden: Math.max(worst.hidden, maxDifference(all(rank.hidden), hidden)),
            routeWeight: Math.max(worst.routeWeight, maxDifference(all(rank.routeWeight), routeWeight)),
          };
        }
      }
      console.log(
        `${name} tp=${size}: max |hidden error| ${worst.hidden.toExponential(2)}, ` +
          `max |route_weight error| ${worst.routeWeight.toExponential(2)}`,
      );
      expect(worst.hidden).toBeLessThan(BOUND);
      expect(worst.routeWeight).toBeLessThan(BOUND);
    },
  );
});
