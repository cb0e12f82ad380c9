// A rank's whole life, from the first instruction to the last.

import { hostname } from 'node:os';
import { pairEndpoint } from '../comm/bootstrap.js';
import type { Collective } from '../comm/collective.js';
import type { FlightRecorder } from '../comm/flight-recorder.js';
import { localCollective } from '../comm/local.js';
import { ZmqCollective } from '../comm/zmq.js';
import { EXIT, fail } from '../errors.js';
import { makePlan, type Plan } from '../model/plan.js';
import { loadWeights, weightBytes } from '../model/weights.js';
import { type EngineSpec, fromNative, type NativeEngine, native } from '../native.js';
import { AsyncErrorPoll } from './async-error.js';
import { type Decoder, runJob } from './decode.js';
import type { Job } from './job.js';
import { Life, type Place, type RunJob } from './life.js';
import { openModel } from './open.js';
import { parseJob, parseSetup, type SentSpec, type Setup } from './wire.js';

/** Lives the life of one rank; resolves with the process's exit code. */
export async function runRank(place: Place): Promise<number> {
  const life = new Life(place);
  const poll = new AsyncErrorPoll();
  try {
    await live(life, poll);
    return EXIT.ok;
  } catch (error) {
    return await life.lastWords(fromNative(error), poll.error);
  } finally {
    poll.stop();
    life.control.close();
  }
}

async function live(life: Life, poll: AsyncErrorPoll): Promise<void> {
  life.enter('addon');
  const { Engine, keepToCores, version } = native();

  life.enter('connect');
  const { rank, ranks, briefing } = life.place;
  const zmq = await bindLinks(life.place);
  const { spec, collective: name, peers } = await meet(life, version().addon, zmq.endpoints);

  life.enter('device');
  if (spec.device === 'cpu' && ranks > 1 && keepToCores(rank, ranks, spec.threads) > 0) zmq.keepAwake();
  const model = openModel(briefing.model);
  const plan = makePlan(model.config, rank, ranks);
  const engine = new Engine(engineSpec(spec, plan, name));

  life.enter('collective');
  zmq.connect(peers);
  const collective: Collective = name === 'local' ? localCollective() : zmq;
  const met = life.recorder.begin('allReduce', -1, 'collective', 4, collective.next);
  await collective.allReduce(new Float32Array(1)); // returns when everybody is there
  met();
  const onDevice = name === 'peer' || name === 'nccl';
  if (onDevice) endGently(life, engine);
  if (onDevice) await joinOnDevice(engine, collective, life.recorder, ranks, spec.initTimeoutMs);
  // peer's kernels bound their own waiting; NCCL's wait for ever
  if (name === 'nccl') poll.start(engine);

  life.enter('weights');
  const total = weightBytes(plan);
  await loadWeights(engine, plan, model.source, (done) => life.progress(done, total));
  model.close();
  await engine.prepare();

  life.enter('warm-up');
  const { limits, trace } = spec;
  const decoder: Decoder = {
    rank,
    size: ranks,
    engine,
    collective,
    recorder: life.recorder,
    steps: plan.steps,
    limits,
    trace,
    bursts: name !== 'zmq',
    onDevice,
  };
  const run: RunJob = (job, report) => runJob(decoder, job, report);
  await run(WARM_UP, async () => {});
  const { weightBytes: resident, cacheBytes } = engine.stats();
  collective.limit(spec.stepTimeoutMs);

  await life.ready({ weightBytes: resident, cacheBytes });
  await serve(life, collective, poll, run);
  poll.stop();
  collective.close();
  engine.close();
}

/** This rank's ends of the sockets between ranks: beside the launcher's on one host, else at this host's address. */
function bindLinks({ control, rank, ranks, briefing: { keys, address } }: Place): Promise<ZmqCollective> {
  const endpoint = (partner: number) =>
    address === null ? pairEndpoint(control, rank, partner) : `tcp://${address}:*`;
  return ZmqCollective.bind(rank, ranks, endpoint, keys);
}

/** Kernels that are told to stop waiting leave within microseconds; the driver needs its moment. */
const FREED_MS = 30;

/** Told to end, a rank first frees its kernels from waiting for peers: a GPU that still spins holds up its process's end. */
function endGently(life: Life, engine: NativeEngine): void {
  process.once('SIGTERM', () => {
    life.hush(); // what the freed call says is no failure of its own
    engine.abort();
    setTimeout(() => process.kill(process.pid, 'SIGTERM'), FREED_MS);
  });
}

/** One token through every layer: pages are touched and caches warm before anything is timed. */
const WARM_UP: Job = {
  kind: 'score',
  sequences: [{ promptIds: [0], maxTokens: 0, sequence: 0 }],
  keepLogits: false,
  fault: null,
};

/** Ids and memory handles are bytes: the host's collective carries them, then the GPUs talk to each other. */
async function joinOnDevice(
  engine: NativeEngine,
  host: Collective,
  recorder: FlightRecorder,
  ranks: number,
  timeoutMs: number,
): Promise<void> {
  const hello = engine.collectiveHello();
  const all = new Uint8Array(hello.length * ranks);
  const floats = (bytes: Uint8Array) => new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  const met = recorder.begin('gather', -1, 'collective', hello.length, host.next);
  await host.gather(floats(hello), floats(all));
  met();
  const hellos = Array.from({ length: ranks }, (_, r) => all.slice(r * hello.length, (r + 1) * hello.length));
  await engine.joinCollective(hellos, timeoutMs);
}

/** Says hello and waits for the launcher to have heard all ranks. */
async function meet(
  life: Life,
  version: string,
  endpoints: Record<string, string>,
): Promise<Setup & { peers: Record<string, string> }> {
  const { control, place } = life;
  const { pid } = process;
  await control.send({ type: 'hello', rank: place.rank, pid, host: hostname(), version, endpoints });
  const message = await control.receive();
  if (message.type !== 'setup') throw fail('TP_MESSAGE_BAD', 'the launcher', `${message.type} before setup`);
  return { ...parseSetup(message.body), peers: message.peers };
}

/** Does jobs, one at a time, and answers questions meanwhile, until the launcher says stop. */
async function serve(life: Life, collective: Collective, poll: AsyncErrorPoll, run: RunJob): Promise<void> {
  await new Promise<void>((stopped, failed) => {
    const listen = async () => {
      for (;;) {
        const message = await life.control.receive();
        if (message.type === 'stop') return;
        if (message.type === 'where') await life.answer(collective.pending(), poll.error);
        if (message.type === 'job') life.work(parseJob(message.body), run).catch(failed);
      }
    };
    listen().then(stopped, failed);
  });
}

function engineSpec(spec: SentSpec, plan: Plan, collective: Setup['collective']): EngineSpec {
  const { device, dtype, isa, threads, limits, trace, eager } = spec;
  const { rank, size, model, layers, steps } = plan;
  const tensors = plan.tensors.map(({ name, shape }) => ({ name, shape }));
  return {
    device,
    deviceIndex: spec.devices[rank] ?? 0,
    dtype,
    collective: collective === 'zmq' ? 'host' : collective,
    isa,
    threads,
    rank,
    size,
    model,
    layers,
    tensors,
    steps,
    limits,
    trace,
    eager,
  };
}
