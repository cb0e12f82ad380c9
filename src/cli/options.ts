// Words -> options: every flag with its default, its TP_RUN_* variable and the commands that know it.
// The only reader of process.env; what leaves here is checked and frozen.

import { availableParallelism } from 'node:os';
import type { Cluster } from '../engine/cluster.js';
import { fail } from '../errors.js';
import { choice, type Flag, real, text, texts, toggle, whole, wholeNumber, wholes } from './flag.js';
import { presetsOf } from './model.js';
import { type Placement, readPlacement } from './placement.js';
import { splitWords } from './words.js';

const RUN = 'The run';
const NODES = 'Several nodes';
const PROMPTS = 'Prompts';
const SAMPLING = 'Tokens';
const OUTPUT = 'Output';
const MEASURE = 'Measuring';

/** Every flag; a key is the flag's name in camelCase. */
const FLAGS = {
  gpus: gpus(),
  device: choice(
    ['auto', 'cuda', 'cpu'],
    RUN,
    'auto: CUDA if a usable GPU is there, else CPU workers',
    'auto',
  ),
  model: text(
    RUN,
    'a Hugging Face checkpoint folder, or a file of configs/',
    null,
    'the embedded tiny model',
  ),
  seed: whole(
    0,
    2 ** 32 - 1,
    RUN,
    'seed of synthetic weights and of sampling',
    null,
    'of the config file; 0',
  ),
  dtype: choice(['bfloat16', 'float32'], RUN, 'activations and KV cache', 'bfloat16'),
  collective: choice(['auto', 'peer', 'nccl', 'zmq'], RUN, 'what joins the ranks', 'auto'),
  isa: choice(['auto', 'generic', 'avx2', 'avx512'], RUN, 'CPU instructions', 'auto'),
  eager: toggle(RUN, 'launch every GPU kernel by itself, record no CUDA graph'),
  threads: whole(1, 1024, RUN, 'compute threads of a rank', null, 'cores / ranks'),
  batch: whole(1, 256, RUN, 'sequences decoded together', 8),
  prefillChunk: whole(1, 8192, RUN, 'prompt tokens processed together, at least the batch', 64),
  maxModelLen: whole(1, 2 ** 31 - 1, RUN, 'longest context', null, 'of the model'),
  initTimeout: real(0, 86_400, true, RUN, 'seconds without progress while starting up', 120),
  stepTimeout: real(0, 86_400, true, RUN, 'seconds for one step', 120),
  logDir: text(RUN, 'a folder for one log file per rank and error.json', null, 'none'),
  maxRestarts: whole(0, 1000, RUN, 'times to start the ranks again when one fails', 0),

  nnodes: whole(1, 1024, NODES, 'tp-run processes that form one run', null, 'what the launcher says; 1'),
  nodeRank: whole(0, 1023, NODES, 'which of them this is; 0 leads', null, 'what the launcher says'),
  masterAddr: text(NODES, 'address of the host of node 0', null, 'what the launcher says'),
  masterPort: whole(1, 65_535, NODES, 'port where node 0 listens', null, '29500'),
  iface: text(NODES, "network interface for tp-run's and NCCL's sockets", null, 'the way to node 0'),
  keyFile: text(NODES, 'the key that all nodes share, see keygen; or TP_RUN_KEY', null, 'none'),
  insecure: toggle(NODES, 'no key: whoever reaches the sockets can join, listen and change'),
  nodeTimeout: real(0, 86_400, true, NODES, 'seconds of silence after which a node is lost', 10),

  prompt: texts(PROMPTS, 'a text prompt; needs a tokenizer'),
  promptIds: texts(PROMPTS, 'a prompt as token ids: 2,17,5'),
  prompts: text(PROMPTS, 'JSONL file, rows with prompt or prompt_ids', null, 'none'),
  chat: toggle(PROMPTS, "put text prompts into the model's chat template"),

  maxTokens: whole(1, 2 ** 31 - 1, SAMPLING, 'new tokens per prompt', 64),
  temperature: real(0, Infinity, false, SAMPLING, '0 takes the likeliest token', 0),
  topK: whole(0, 2 ** 31 - 1, SAMPLING, 'sample among the k likeliest; 0 = all', 0),
  topP: real(0, 1, true, SAMPLING, 'sample among the likeliest that hold this much probability', 1),
  ignoreEos: toggle(SAMPLING, 'go on after an end token'),

  level: choice(['tokens', 'logits', 'layers'], MEASURE, 'how deep to compare', 'layers'),
  repeats: whole(1, 1000, MEASURE, 'fresh runs to compare', 2),
  plantFault: faultPlace(),
  batchSize: wholes(1, 256, MEASURE, 'batch sizes to measure', [1]),
  context: wholes(1, 2 ** 31 - 1, MEASURE, 'tokens in the cache where the measured steps begin', [32]),
  steps: whole(1, 1_000_000, MEASURE, 'measured decode steps', 32),
  stages: toggle(MEASURE, 'also time every stage of the step'),
  trace: text(
    MEASURE,
    'a file for the first timed steps, to open in Perfetto; implies --stages',
    null,
    'none',
  ),
  sizes: wholes(1, 2 ** 28, MEASURE, 'floats of a message', [2816, 5632, 11264, 22528, 45056]),
  variant: choice(
    ['all', 'published', 'grouped', 'auto'],
    MEASURE,
    'which kernels; auto: as the ops choose, where no resident step has them',
    'all',
  ),
  tokens: wholes(1, 8192, MEASURE, 'tokens of a step', [1, 2, 4, 8, 16, 32, 64]),
  iterations: whole(1, 1_000_000, MEASURE, 'timed all-reduces per size, or replays per row', 200),
  warmup: whole(0, 1_000_000, MEASURE, 'untimed all-reduces or steps before', 10),

  dumpLogits: text(OUTPUT, 'safetensors file for the logits rows', null, 'none'),
  json: toggle(OUTPUT, 'one JSON object on stdout, nothing else'),
  out: text(OUTPUT, 'also write the JSON result to this file', null, 'none'),
};

type Flags = typeof FLAGS;
type FlagValues = { [K in keyof Flags]: Flags[K] extends Flag<infer T> ? T : never };

/** What no flag says. */
interface Surroundings {
  /** Which node of the run this process is, and who says so. */
  place: Placement;
  /** TP_RUN_KEY: it has no flag, because everybody can read a command line. */
  key: string | null;
  /** The other nodes, once node 0 has gathered them. */
  cluster: Cluster | null;
}

export type Options = Readonly<FlagValues & Surroundings>;

/** The ranks of a run, and their devices when the caller chose them. */
export interface Gpus {
  count: number;
  devices: readonly number[] | null;
}

const ENGINE = [
  ...(['gpus', 'device', 'model', 'seed', 'dtype', 'collective', 'isa', 'threads', 'eager'] as const),
  ...(['maxModelLen', 'initTimeout', 'stepTimeout', 'logDir', 'json'] as const),
  ...([
    'nnodes',
    'nodeRank',
    'masterAddr',
    'masterPort',
    'iface',
    'keyFile',
    'insecure',
    'nodeTimeout',
  ] as const),
] as const;
const TEXTS = ['prompt', 'promptIds', 'prompts', 'chat', 'batch', 'prefillChunk'] as const;

/** Where `--plant-fault` puts its fault. */
export interface FaultPlace {
  layer: number;
  stage: string;
  /** null = the last rank */
  rank: number | null;
}

export interface CommandWords {
  describe: string;
  flags: readonly (keyof Flags)[];
  /** The word that must follow the command, if any. */
  word?: string;
}

/** Variables without a flag. */
const KEY = 'TP_RUN_KEY';

/** The commands of a user; `worker` is the launcher's own and takes its options over the control channel. */
export const COMMANDS = {
  generate: {
    describe: 'decode prompts (the default command)',
    flags: [
      ...ENGINE,
      ...TEXTS,
      'maxTokens',
      'temperature',
      'topK',
      'topP',
      'ignoreEos',
      'dumpLogits',
      'maxRestarts',
    ],
  },
  score: { describe: 'log-probability of every prompt token', flags: [...ENGINE, ...TEXTS, 'dumpLogits'] },
  check: {
    describe: 'prove that ranks, batch and repetition do not change a bit',
    flags: [...ENGINE, ...TEXTS, 'maxTokens', 'level', 'repeats', 'plantFault', 'out'],
  },
  'bench decode': {
    describe: 'time per token, bytes read and share of the memory bandwidth',
    flags: [
      ...ENGINE,
      ...(['batchSize', 'context', 'steps', 'warmup', 'stages', 'trace', 'prefillChunk', 'out'] as const),
    ],
  },
  'bench allreduce': {
    describe: 'time of the all-reduce at the sizes that decoding uses',
    flags: [...ENGINE, 'sizes', 'iterations', 'warmup', 'out'],
  },
  'bench moe': {
    describe: 'time of the experts of one layer alone, on one GPU',
    flags: ['gpus', 'model', 'seed', 'variant', 'tokens', 'iterations', 'out', 'json'],
  },
  doctor: { describe: 'say what this machine offers', flags: ['gpus', 'device', 'json'] },
  export: {
    describe: 'write a synthetic model as a Hugging Face checkpoint',
    word: 'DIR',
    flags: ['model', 'seed'],
  },
  ps: { describe: "list this user's runs on this host", flags: ['json'] },
  kill: { describe: 'end a run, by the beginning of its id, or all', word: 'RUN', flags: [] },
  keygen: { describe: 'write a new key for --key-file', word: 'FILE', flags: [] },
} as const satisfies Record<string, CommandWords>;

export type Command = keyof typeof COMMANDS;

export type Invocation =
  | { kind: 'run'; command: Command; words: readonly string[]; options: Options }
  | { kind: 'help'; text: string }
  | { kind: 'version' };

/**
 * Reads a command line, the environment and what the named model presets: the first that sets a flag wins.
 * Throws TP_COMMAND, TP_FLAG_UNKNOWN, TP_FLAG_VALUE or TP_VARIABLE_UNKNOWN, and what a bad model throws.
 */
export function readCommandLine(argv: readonly string[], env: NodeJS.ProcessEnv = process.env): Invocation {
  const [command, rest] = splitCommand(argv);
  if (!isCommand(command)) throw fail('TP_COMMAND', command, Object.keys(COMMANDS));
  const about: CommandWords = COMMANDS[command];
  const flags = new Map(about.flags.map((key): [string, Flag<unknown>] => [dashed(key), FLAGS[key]]));
  const { given, words, help } = splitWords(rest, command, about, epilogue(), flags);
  if (help !== null) return { kind: 'help', text: help };
  if (given.version) return { kind: 'version' };
  refuseUnknownVariables(env);
  const set = (name: string) => readSetting(flags.get(name), name, given[name], env);
  const model = (set('model') ?? null) as string | null;
  const presets: Record<string, unknown> = flags.has('model') ? presetsOf(model) : {};
  const entries = Object.entries<Flag<unknown>>(FLAGS).map(([key, flag]) => {
    const name = dashed(key);
    return [key, set(name) ?? readPreset(flags.get(name), name, presets[name]) ?? flag.fallback];
  });
  const values = Object.fromEntries(entries) as FlagValues;
  const surroundings: Surroundings = {
    place: readPlacement(values, flags.has('nnodes') ? env : {}),
    key: env[KEY] ?? null,
    cluster: null,
  };
  return { kind: 'run', command, words, options: Object.freeze({ ...values, ...surroundings }) };
}

/** Ranks of a run: those of all nodes. */
export function ranksOf({ cluster, gpus }: Pick<Options, 'cluster' | 'gpus'>): number {
  return cluster?.members.ranks ?? gpus.count;
}

/** The variables that this process hands on to its workers; the key is not for them. */
export function environment(): NodeJS.ProcessEnv {
  const { [KEY]: _, ...others } = process.env;
  return others;
}

/** Compute threads of a rank when `--threads` does not say: the cores shared out among `ranks` of a host, at least one. */
export function defaultThreads(ranks: number): number {
  return Math.max(1, Math.floor(availableParallelism() / ranks));
}

type Known = Flag<unknown> | undefined;

/** What the command line, else the flag's variable says; undefined when neither does or the command lacks the flag. */
function readSetting(flag: Known, name: string, given: unknown, env: NodeJS.ProcessEnv): unknown {
  const source = given === undefined ? variableName(name) : `--${name}`;
  const said = given ?? env[source];
  if (!flag || said === undefined) return undefined;
  if (flag.kind === 'list') return [said].flat().flatMap((text) => checked(flag, source, text));
  if (Array.isArray(said)) throw fail('TP_FLAG_VALUE', source, 'one value', `${said.length}`);
  return checked(flag, source, said);
}

/** Preset prompts are no setting: they stand in where no prompt is given at all, see prompts.ts. */
function readPreset(flag: Known, name: string, preset: unknown): unknown {
  if (!flag || preset === undefined || flag.kind === 'list') return undefined;
  return checked(flag, `the model's preset ${name}`, preset);
}

function checked(flag: Flag<unknown>, source: string, said: unknown): unknown {
  const value = flag.read(String(said));
  if (value === undefined) throw fail('TP_FLAG_VALUE', source, flag.expected, JSON.stringify(said));
  return value;
}

/** A misspelt variable would otherwise be ignored in silence. */
function refuseUnknownVariables(env: NodeJS.ProcessEnv): void {
  const known = new Set([KEY, ...Object.keys(FLAGS).map(dashed).map(variableName)]);
  for (const name of Object.keys(env)) {
    if (name.startsWith('TP_RUN_') && !known.has(name)) throw fail('TP_VARIABLE_UNKNOWN', name);
  }
}

function epilogue(): string {
  const commands = Object.entries(COMMANDS).map(([name, { describe }]) => `  ${name.padEnd(16)} ${describe}`);
  return `Commands:\n${commands.join('\n')}\n\nEvery flag has a variable: --prompt-ids is TP_RUN_PROMPT_IDS.`;
}

/** The command, of one word or two, and what follows it. */
function splitCommand(argv: readonly string[]): [command: string, rest: readonly string[]] {
  const words = argv.findIndex((word) => word.startsWith('-'));
  const leading = argv.slice(0, words < 0 ? argv.length : words);
  if (leading.length === 0) return ['generate', argv];
  const count = leading[0] === 'bench' ? Math.min(2, leading.length) : 1;
  return [leading.slice(0, count).join(' '), argv.slice(count)];
}

function isCommand(word: string): word is Command {
  return Object.hasOwn(COMMANDS, word);
}

function dashed(key: string): string {
  return key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
}

function variableName(name: string): string {
  return `TP_RUN_${name.replaceAll('-', '_').toUpperCase()}`;
}

/** `--gpus 2` counts ranks, `--gpus 0,3` names their devices; ranks may share one: `--gpus 0,0,1,1`. */
function gpus(): Flag<Gpus> {
  return {
    kind: 'value',
    group: RUN,
    describe: 'ranks, or the devices to use: 2, or 0,3',
    expected: 'a number of ranks from 1 to 64, or device numbers with commas between them',
    fallback: { count: 1, devices: null },
    shown: '1',
    read(text) {
      const numbers = text.split(',').map((part) => wholeNumber(part, 0, 64));
      const devices = numbers.filter((n) => n !== undefined);
      if (devices.length < numbers.length) return undefined;
      if (devices.length > 1) return { count: devices.length, devices };
      return devices[0]! > 0 ? { count: devices[0]!, devices: null } : undefined;
    },
  };
}

/** `layer=3,stage=attention[,rank=1]`; whether the model has such a place is checked when it is known. */
function faultPlace(): Flag<FaultPlace | null> {
  return {
    kind: 'value',
    group: MEASURE,
    describe: 'show a failure: plant a fault at layer=3,stage=attention[,rank=1]',
    expected: 'layer=L,stage=NAME[,rank=R]',
    fallback: null,
    shown: 'none',
    read(text) {
      const match = /^layer=(\d{1,6}),stage=([A-Za-z]+)(?:,rank=(\d{1,6}))?$/.exec(text);
      if (!match) return undefined;
      return { layer: Number(match[1]), stage: match[2]!, rank: match[3] ? Number(match[3]) : null };
    },
  };
}
