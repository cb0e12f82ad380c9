// A worker without a model: it keeps the launcher's protocol, and rank 1 misbehaves as its first word says.

import { spawn } from 'node:child_process';
import { hostname } from 'node:os';
import { Dealer } from 'zeromq';
import { ControlClient } from '../../dist/comm/control.js';

const [how, endpoint, run, rankWord] = process.argv.slice(2);
const rank = Number(rankWord);
const odd = (what) => rank === 1 && how === what;

const stuck = ['gets stuck at step 2', 'sends another size', 'has lost a link'].includes(how);

const forEver = () => new Promise((resolve) => setTimeout(resolve, 1e9));
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const report = (step, token) => ({
  step,
  kind: 'decode',
  tokens: [{ sequence: 0, position: step }],
  rows: [{ sequence: 0, position: step, token, logprob: -1, targetLogprob: null, finish: null }],
  time: { computeMs: 1, syncMs: 1, hostMs: 1 },
  readBytes: 0,
  expertsRead: 0,
  logits: false,
  trace: null,
  times: null,
});

if (odd('ignores SIGTERM')) process.on('SIGTERM', () => {});
if (odd('leaves a child')) spawn('sleep', ['1000'], { stdio: 'inherit' });
if (odd('cannot start')) {
  console.error('first line\nno such library: libodd.so');
  process.exit(127);
}
if (odd('exits with 0')) process.exit(0);
if (odd('never connects')) await forEver();

const control = new ControlClient(endpoint, run, rank);
const hello = (changes) =>
  control.send({
    type: 'hello',
    rank,
    pid: process.pid,
    host: hostname(),
    version: '1',
    endpoints: {},
    ...changes,
  });

if (odd('talks garbage')) {
  const stranger = new Dealer({ routingId: 'nobody' });
  stranger.connect(endpoint);
  await stranger.send(['x', 'y', 'z']);
  await stranger.send(Buffer.alloc(0));
  stranger.close();
  await hello({ rank: 0 });
  await control.send({ type: 'hello', unknown: true });
  await control.send({ type: 'stage', stage: 'lunch' });
  await control.send({ type: 'stage', stage: 'addon' }, [new Uint8Array(8)]);
}
await hello({});
await control.receive(); // setup
if (odd('reports bad input')) {
  const error = {
    type: 'error',
    code: 'TP_SHARD_UNEVEN',
    text: '3 heads',
    exitCode: 2,
    stage: 'device',
    step: -1,
    collectives: [],
    asyncError: '',
  };
  await control.send(error);
  await sleep(100);
  process.exit(2);
}
await control.send({ type: 'stage', stage: 'weights' });
if (odd('hangs in weights')) await forEver();
for (let done = 0; odd('loads slowly') && done < 10; done++) {
  await control.send({ type: 'progress', done, total: 10 });
  await sleep(100);
}
if (how === 'stdout') console.log(`words of rank ${rank} on stdout`);
if (how === 'variables')
  console.log(['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'COLOUR'].map((name) => process.env[name]).join(' '));
await control.send({ type: 'stage', stage: 'warm-up' });
await control.send({ type: 'ready', body: { weightBytes: 10 + rank, cacheBytes: 1, stageMs: { spawn: 1 } } });

for (;;) {
  const message = await control.receive();
  if (message.type === 'stop') {
    if (odd('does not stop')) await forEver();
    break;
  }
  if (message.type === 'where') {
    // rank 1 computes for ever, all others wait for it
    const doing = rank === 1 ? 'computes step 2' : 'waits for rank 1 in allReduce #9';
    const entry = { op: 'allReduce', layer: 2, stage: 'down', bytes: 64, agoMs: 500, tookMs: 1 };
    const collectives = [
      { ...entry, place: 11, n: 8 },
      {
        ...entry,
        place: 12,
        n: 9,
        bytes: how === 'sends another size' && rank === 1 ? 32 : 64,
        tookMs: null,
      },
    ];
    const behind = how !== 'sends another size' && rank === 1;
    await control.send({
      type: 'at',
      doing,
      waitsFor: rank === 1 ? null : 1,
      collectives: behind ? collectives.slice(0, 1) : collectives,
      asyncError: how === 'has lost a link' && rank === 0 ? 'nccl: remote process exited' : '',
    });
  }
  if (message.type !== 'job') continue;
  const steps = odd('stops early') ? 2 : 3;
  for (let step = 0; step < steps; step++) {
    if (odd('dies at step 2') && step === 2) {
      await sleep(100); // SIGKILL takes along what has not left the process yet: steps 0 and 1 must be told
      process.kill(process.pid, 'SIGKILL');
    }
    if (stuck && step === 2) break;
    const token = odd('disagrees at step 1') && step === 1 ? 999 : step;
    await control.send({ type: 'report', frames: 0, body: report(step, token) });
  }
  if (stuck) continue;
  await control.send({ type: 'result', body: { kind: 'generate', steps } });
}
control.close();
