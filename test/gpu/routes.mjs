// Which experts tp-run's router chooses, in float32, as JSON on stdout: for every prompt its layers, tokens and choices,
// [layers, T, K] flat. `node routes.mjs MODEL-DIR DEVICE '[[2,17],[2,5,9]]'`

import { openCheckpoint } from '../../dist/model/checkpoint.js';
import { makePlan } from '../../dist/model/plan.js';
import { loadWeights } from '../../dist/model/weights.js';
import { native } from '../../dist/native.js';

const [dir, device, text] = process.argv.slice(2);
const prompts = JSON.parse(text);
const checkpoint = openCheckpoint(dir);
const plan = makePlan(checkpoint.config, 0, 1);
const longest = Math.max(...prompts.map((ids) => ids.length));
const engine = new (native().Engine)({
  ...plan,
  // the host's syncs bring every layer's router into view
  ...{ device, deviceIndex: 0, dtype: 'float32', collective: 'host', isa: 'auto', threads: 2, trace: false },
  limits: { tokens: longest, rows: 1, sequences: 1, positions: longest, candidates: 1 },
});
await loadWeights(engine, plan, { kind: 'checkpoint', checkpoint });
checkpoint.close();
await engine.prepare();

const chosen = [];
for (const ids of prompts) {
  const routes = [];
  engine.begin({
    tokens: Int32Array.from(ids),
    positions: Int32Array.from(ids, (_, position) => position),
    slots: new Int32Array(ids.length),
    ...{ rows: new Int32Array(0), targets: new Int32Array(0), temperature: new Float32Array(0) },
    ...{ topK: new Int32Array(0), topP: new Float32Array(0), seed: new Uint32Array(0) },
    sequence: new Int32Array(0),
  });
  for (let at = 0; ; at++) {
    at = await engine.run(at);
    if (at === plan.steps.length) break;
    if (plan.steps[at].stage === 'down') routes.push(...engine.readBuffer('routeIndex'));
  }
  chosen.push(routes);
}
engine.close();
console.log(JSON.stringify(chosen));
