// `node scripts/fuzz.mjs TARGET [--seconds S] [--cases N] [--seed X]`: throws changed inputs at code that reads what others
// wrote, until the time or the number is up. Targets: safetensors (headers of files), messages (decoding), hostlist,
// control (multipart frames and raw bytes at a live control socket). The corpus is test/fixtures/fuzz/TARGET; an input that
// breaks something is kept there too, as crash-*, and ends the run with 1. Needs dist/.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Dealer } from 'zeromq';
import { expandHostlist, expandTasks } from '../dist/cli/hostlist.js';
import { ControlClient, ControlServer } from '../dist/comm/control.js';
import { decodeLauncher, decodeWorker } from '../dist/comm/messages.js';
import { decodeFollower, decodeLeader } from '../dist/comm/node-messages.js';
import { TpError } from '../dist/errors.js';
import { log } from '../dist/log.js';
import { SafetensorsFile } from '../dist/model/safetensors.js';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const RUN = 'run-1';
/** A case that takes longer has met something that grows too fast, in ms of processor time. */
const SLOW_MS = 2000;
/** As src/cli/hostlist.ts has it. */
const MOST_HOSTS = 65_536;
/** Lists that Slurm could read, for each one that it does read: starting it takes 10 ms. */
const SCONTROL_EVERY = 200;

const TARGETS = { safetensors, messages, hostlist, control };

const [target, ...words] = process.argv.slice(2);
const value = (name, fallback) => (words.includes(name) ? Number(words[words.indexOf(name) + 1]) : fallback);
const seconds = value('--seconds', 60);
const most = value('--cases', Infinity);
let state = value('--seed', Date.now() % 1_000_000);
if (!TARGETS[target]) {
  console.error(`fuzz: say one of ${Object.keys(TARGETS).join(', ')}`);
  process.exit(2);
}
console.log(`${target}: seed ${state}`);
log.level = 'error';

const folder = join(root, 'test/fixtures/fuzz', target);
const corpus = readdirSync(folder).map((name) => readFileSync(join(folder, name)));
const started = performance.now();
let cases = 0;
let accepted = 0;
const goesOn = () => cases < most && performance.now() - started < seconds * 1000;

/** A file is refused by its code, or its tensors lie inside it without a gap. */
function safetensors() {
  const dir = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'tp-run-fuzz-'));
  const path = join(dir, 'x.safetensors');
  try {
    while (goesOn()) {
      const bytes = change(pick(corpus), true);
      const fd = openSync(path, 'w');
      writeSync(fd, bytes);
      ftruncateSync(fd, bytes.length);
      closeSync(fd);
      judge(bytes, () => {
        const file = new SafetensorsFile(path);
        try {
          const sum = [...file.tensors.values()].reduce((n, tensor) => n + tensor.bytes, 0);
          const begin = 8 + Number(bytes.readBigUInt64LE());
          if (begin + sum !== bytes.length)
            throw new Error(`tensors of ${sum} bytes from ${begin} in ${bytes.length}`);
          for (const name of file.tensors.keys()) file.read(name);
        } finally {
          file.close();
        }
      });
    }
  } finally {
    rmSync(dir, { recursive: true });
  }
}

function messages() {
  const readers = [
    (bytes) => decodeWorker(RUN, bytes, 'rank 1'),
    (bytes) => decodeLauncher(RUN, bytes),
    (bytes) => decodeFollower(bytes, 'node 1'),
    decodeLeader,
  ];
  while (goesOn()) {
    const bytes = change(pick(corpus), false);
    judge(bytes, () => pick(readers)(bytes));
  }
}

/**
 * A list is refused by its code, or it is short enough, its hosts say themselves, and it has as many as its parts have
 * together. Where Slurm is installed it reads a sample of the accepted ones too.
 */
function hostlist() {
  const slurm = new Scontrol();
  try {
    while (goesOn()) {
      const bytes = change(pick(corpus), false);
      const text = bytes.toString('latin1').slice(0, 200);
      let read = null;
      judge(bytes, () => {
        if (text.length % 2 === 0) {
          const tasks = expandTasks(text);
          if (tasks.length > MOST_HOSTS || tasks.some((n) => !Number.isInteger(n) || n < 0))
            throw new Error(`${tasks.length} nodes of ${tasks.slice(0, 9)} tasks`);
          return;
        }
        const hosts = expandHostlist(text);
        if (hosts.length > MOST_HOSTS || hosts.some((host) => /[[\],]/.test(host)))
          throw new Error(`${hosts.length} hosts: ${hosts.slice(0, 9)}`);
        if (below(50) === 0 && `${expandHostlist(hosts.join(','))}` !== `${hosts}`)
          throw new Error('its hosts, as a list, are other hosts');
        read = hosts;
      });
      if (read !== null && !slurm.agrees(text, read)) {
        keep(bytes);
        throw new Error(`scontrol reads ${JSON.stringify(text)} otherwise than as ${read.slice(0, 9)}`);
      }
    }
  } finally {
    slurm.close();
  }
  return `, ${slurm.compared} compared with scontrol`;
}

/** Slurm's own reading, for every so many of the lists that it can read as well. */
class Scontrol {
  compared = 0;
  #seen = 0;
  #folder = mkdtempSync(join(tmpdir(), 'tp-run-fuzz-'));
  #here = spawnSync('scontrol', ['--version']).error === undefined;

  constructor() {
    writeFileSync(join(this.#folder, 'slurm.conf'), 'ClusterName=x\nSlurmctldHost=localhost\nNodeName=n0\n');
  }

  agrees(text, hosts) {
    // what Slurm reads otherwise on purpose is left out: names without a letter in front, numbers that it cuts to 64 bits
    const host = /^(?!\S*\d{10})[a-z][\w.-]*(?:\[\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?)*\])?$/i;
    if (!this.#here || !text.split(/,(?![^[]*\])/).every((item) => host.test(item))) return true;
    if (this.#seen++ % SCONTROL_EVERY !== 0) return true;
    this.compared++;
    const env = { ...process.env, SLURM_CONF: join(this.#folder, 'slurm.conf') };
    const { stdout, status } = spawnSync('scontrol', ['show', 'hostnames', text], {
      env,
      encoding: 'utf8',
      maxBuffer: 1 << 28,
    });
    return status === 0 && stdout.trim() === hosts.join('\n');
  }

  close() {
    rmSync(this.#folder, { recursive: true });
  }
}

/** A live server hears every good message between any number of bad ones, and nothing of the bad ones kills it. */
async function control() {
  const dir = mkdtempSync(join(tmpdir(), 'tp-run-fuzz-'));
  const server = await ControlServer.bind(`ipc://${dir}/control`, RUN, 4);
  const good = new ControlClient(server.endpoint, RUN, 0);
  const heard = server.messages();
  let done = -1;
  void (async () => {
    for await (const { rank, message } of heard) {
      if (rank === 0 && message.type === 'progress') done = message.done;
      else accepted++;
    }
  })();
  try {
    for (let batch = 0; goesOn(); batch++) {
      const routingId = pick(['rank-1', 'rank-3', 'rank-9', 'x', 'rank-0x1', '\u00ff'.repeat(100)]);
      const stranger = new Dealer({ routingId, linger: 0, sendHighWaterMark: 0 });
      stranger.connect(server.endpoint);
      const inputs = Array.from({ length: 500 }, () =>
        Array.from({ length: 1 + below(4) }, () => change(pick(corpus), false)),
      );
      for (const parts of inputs) await stranger.send(parts);
      cases += inputs.length;
      // below ZeroMQ: bytes that are no greeting, and greetings that are cut off
      const raw = createConnection(`${dir}/control`).on('error', () => {});
      raw.write(change(pick(corpus), true));
      if (below(2))
        raw.write(Buffer.concat([Buffer.from('ff00000000000000017f03', 'hex'), change(pick(corpus), true)]));
      cases++;
      await good.send({ type: 'progress', done: batch, total: batch });
      const late = performance.now() + 5000;
      while (done !== batch) {
        if (performance.now() > late) {
          keep(Buffer.concat(inputs.flat()));
          throw new Error(`a good message was not heard within 5 s after batch ${batch} of ${routingId}`);
        }
        await new Promise((tick) => setImmediate(tick));
      }
      stranger.close();
      raw.destroy();
    }
  } finally {
    good.close();
    server.close();
    rmSync(dir, { recursive: true });
  }
}

/** Runs one case: errors with a code are how bad input is to end. */
function judge(bytes, act) {
  const before = process.cpuUsage();
  cases++;
  try {
    act();
    accepted++;
  } catch (error) {
    if (!(error instanceof TpError) || error.code === 'TP_INTERNAL') {
      keep(bytes);
      throw error;
    }
  }
  const { user, system } = process.cpuUsage(before); // a busy machine is no fault of ours
  if ((user + system) / 1000 > SLOW_MS) {
    keep(bytes);
    throw new Error(`${bytes.length} bytes took ${Math.round((user + system) / 1000)} ms`);
  }
}

function keep(bytes) {
  mkdirSync(folder, { recursive: true });
  const name = `crash-${createHash('sha256').update(bytes).digest('hex').slice(0, 12)}`;
  writeFileSync(join(folder, name), bytes);
  console.log(`kept ${join(folder, name)}`);
}

/** One to four changes; `sized`: the first 8 bytes are the length of what follows, and mostly kept true. */
function change(input, sized) {
  let bytes = Buffer.from(input);
  let data = 0;
  if (sized && bytes.length >= 8) {
    const length = Number(bytes.readBigUInt64LE());
    data = Math.max(0, bytes.length - 8 - length);
    bytes = bytes.subarray(8);
  }
  const header = bytes.length - data;
  let text = Buffer.from(bytes.subarray(0, header));
  for (let n = 1 + below(4); n > 0; n--) text = CHANGES[below(CHANGES.length)](text);
  if (!sized) return text;
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(below(20) ? BigInt(text.length) : BigInt(below(2 ** 32)) << BigInt(below(32)));
  const rest = bytes.subarray(header);
  return Buffer.concat([prefix, text, below(10) ? rest : rest.subarray(0, below(rest.length + 1))]);
}

/** What breaks readers: numbers at the edge, other brackets, escapes, names that objects have already. */
const TOKENS = [
  ...[
    '-1',
    '-0',
    '1e400',
    '9007199254740993',
    '18446744073709551615',
    '0.5',
    'null',
    'true',
    '[]',
    '{}',
    '""',
    ',',
    ':',
  ],
  ...[
    '"__proto__"',
    '"constructor"',
    '"\\u0000"',
    '"\\ud800"',
    '[[[[[[[[',
    '{"a":{"a":{"a":',
    '"BF16"',
    '"__metadata__"',
    '\ufeff',
  ],
  ...[
    '[0-9]',
    '[',
    ']',
    '(x9)',
    '-',
    '\x00',
    '\xc1',
    '\xd4\x72\x40',
    '\xdf\xff\xff\xff\xff',
    '\xdd\xff\xff\xff\xff',
    '\xc6\xff\xff\xff\xff',
    '\x80',
  ],
].map((token) => Buffer.from(token, token.charCodeAt(0) > 0xff ? 'utf8' : 'latin1'));

const CHANGES = [
  (b) => (b.length ? set(b, below(b.length), below(256)) : b),
  (b) => (b.length ? set(b, below(b.length), b[below(b.length)] ^ (1 << below(8))) : b),
  (b) => b.subarray(0, below(b.length + 1)),
  (b) => insert(b, below(b.length + 1), pick(TOKENS)),
  (b) => {
    const at = below(b.length + 1);
    return Buffer.concat([b.subarray(0, at), b.subarray(Math.min(b.length, at + 1 + below(8)))]);
  },
  (b) => {
    const [from, length] = [below(b.length + 1), below(32)];
    return insert(b, below(b.length + 1), b.subarray(from, from + length));
  },
  (b) => {
    const other = pick(corpus);
    return Buffer.concat([
      b.subarray(0, below(b.length + 1)),
      other.subarray(below(other.length + 1)),
    ]).subarray(0, 1 << 16);
  },
  (b) =>
    Buffer.from(
      b
        .toString('latin1')
        .replace(/\d+/, () => String(below(2) ? below(100) : below(2 ** 32) * below(2 ** 32))),
      'latin1',
    ),
];

function insert(bytes, at, more) {
  return Buffer.concat([bytes.subarray(0, at), more, bytes.subarray(at)]);
}

function set(bytes, at, value) {
  const copy = Buffer.from(bytes);
  copy[at] = value;
  return copy;
}

function pick(list) {
  return list[below(list.length)];
}

/** A whole number from 0 to n - 1 (mulberry32). */
function below(n) {
  state = (state + 0x6d2b79f5) >>> 0;
  let x = Math.imul(state ^ (state >>> 15), state | 1);
  x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
  return Math.floor((((x ^ (x >>> 14)) >>> 0) / 2 ** 32) * n);
}

let more = '';
try {
  more = (await TARGETS[target]()) ?? '';
} catch (error) {
  console.log(`${target}: after ${cases} cases: ${error.stack ?? error}`);
  process.exit(1);
}
const took = (performance.now() - started) / 1000;
console.log(
  `${target}: ${cases} cases in ${took.toFixed(1)} s, ${accepted} accepted${more}, none broke anything; ${(process.memoryUsage.rss() / 2 ** 20).toFixed(0)} MiB`,
);
process.exit(0);
