// Every error tp-run raises on purpose: its code, its exit code and its message, in one table.
// Messages give the real values and the next thing to try; the rank is appended when it is known.

/** Exit codes of every command. */
export const EXIT = {
  ok: 0,
  /** the command ran and the answer is no (check differs) */
  no: 1,
  /** bad input or environment */
  input: 2,
  /** check's negative control was not detected */
  control: 3,
  /** a worker failed */
  worker: 4,
  interrupted: 130,
} as const;

type Row = readonly [exit: number, text: (...values: never[]) => string];

const TABLE = {
  // --- model ---
  TP_SHARD_UNEVEN: [
    EXIT.input,
    (count: number, what: string, ranks: number, legal: readonly number[]) =>
      `${count} ${what} cannot be split over ${ranks} ranks; use ${listOf(legal)}`,
  ],
  TP_FILE_UNREADABLE: [EXIT.input, (path: string, why: string) => `${path} cannot be read: ${why}`],
  TP_FILE_UNWRITABLE: [
    EXIT.input,
    (path: string, why: string) =>
      `${path} cannot be written: ${why}; choose a place with room and permission`,
  ],
  TP_JSON: [EXIT.input, (path: string, why: string) => `${path} is not valid JSON: ${why}`],
  TP_FILE_CHANGED: [
    EXIT.input,
    (path: string, why: string) =>
      `${path} changed while it was read: ${why}; start again when it is at rest`,
  ],
  TP_SAFETENSORS: [
    EXIT.input,
    (path: string, why: string) => `${path} is not a valid safetensors file: ${why}; fetch it again`,
  ],
  TP_CHECKPOINT: [EXIT.input, (dir: string, why: string) => `checkpoint ${dir} cannot be used: ${why}`],
  TP_TENSOR_MISSING: [
    EXIT.input,
    (name: string, dir: string) => `checkpoint ${dir} has no tensor ${name}, which its config.json asks for`,
  ],
  TP_TENSOR_UNEXPECTED: [
    EXIT.input,
    (name: string, path: string) => `${path} holds tensor ${name}, for which its config.json has no place`,
  ],
  TP_TENSOR_SHAPE: [
    EXIT.input,
    (name: string, expected: readonly number[], found: readonly number[], path: string) =>
      `tensor ${name} must have shape [${expected.join(', ')}] by config.json, but ${path} holds [${found.join(', ')}]`,
  ],
  TP_EXPORT_FOLDER: [
    EXIT.input,
    (dir: string, found: string) => `${dir} is not empty: it holds ${found}; name a new or empty folder`,
  ],
  TP_TOKENIZER: [EXIT.input, (path: string, why: string) => `tokenizer ${path} cannot be used: ${why}`],
  TP_TOKENIZER_MISSING: [
    EXIT.input,
    (dir: string) =>
      `${dir} has no tokenizer.json to read a text prompt with; give token ids by --prompt-ids`,
  ],
  TP_CHAT_TEMPLATE: [
    EXIT.input,
    (path: string, why: string) => `chat template ${path} cannot be used: ${why}`,
  ],
  TP_CHAT_TEMPLATE_MISSING: [
    EXIT.input,
    (dir: string) => `${dir} has no chat_template.jinja to lay out messages with; give a plain --prompt`,
  ],
  TP_TENSOR_DTYPE: [
    EXIT.input,
    (name: string, found: string, path: string) =>
      `tensor ${name} in ${path} is ${found}; tp-run reads BF16 weights only`,
  ],
  TP_CONFIG_FIELD: [
    EXIT.input,
    (where: string, what: string, found: unknown) => `${where} must ${what}, found ${shown(found)}`,
  ],
  TP_CONFIG_KEY: [
    EXIT.input,
    (where: string, key: string) => `${where}${key} is not a known key; remove it or correct its spelling`,
  ],
  TP_CONFIG_VALUE: [EXIT.input, (where: string, why: string) => `${where}: ${why}`],
  TP_CONFIG_UNSUPPORTED: [
    EXIT.input,
    (where: string, key: string, found: unknown, need: string) =>
      `${where}${key} = ${shown(found)} is not supported: ${need}`,
  ],
  // --- command line ---
  TP_COMMAND: [
    EXIT.input,
    (command: string, known: readonly string[]) => `there is no command "${command}"; use ${listOf(known)}`,
  ],
  TP_FLAG_UNKNOWN: [
    EXIT.input,
    (flag: string, command: string) =>
      `${flag} means nothing to "tp-run ${command}"; see "tp-run ${command} --help"`,
  ],
  TP_FLAG_VALUE: [
    EXIT.input,
    (flag: string, expected: string, received: string) =>
      `expected ${expected} for ${flag} but received ${received}`,
  ],
  TP_VARIABLE_UNKNOWN: [
    EXIT.input,
    (name: string) =>
      `${name} is set, but no flag of tp-run has this variable; unset it or see "tp-run --help"`,
  ],
  TP_DEVICE: [EXIT.input, (why: string) => `--device cuda cannot be used: ${why}; use --device cpu or auto`],
  TP_PROMPT_EMPTY: [EXIT.input, (where: string) => `${where} is empty: a prompt needs at least one token id`],
  TP_PROMPT_TOKEN: [
    EXIT.input,
    (id: number | string, where: string, vocab: number) =>
      `${where} holds token id ${id}; ids of this model are whole numbers from 0 to ${vocab - 1}`,
  ],
  TP_PROMPT_LENGTH: [
    EXIT.input,
    (where: string, prompt: number, more: number, context: number, limit: string) =>
      `${where} has ${prompt} tokens and ${more} more are wanted, but the context is ${context} (${limit})`,
  ],
  TP_PROMPT_FILE: [
    EXIT.input,
    (file: string, why: string) =>
      `prompts file ${file}: ${why}; every line holds {"prompt": "text"} or {"prompt_ids": [2, 17]}`,
  ],
  TP_RUN_UNKNOWN: [
    EXIT.input,
    (which: string, known: readonly string[]) =>
      `no run of this user on this host begins with ${which || '""'}; ${known.length ? `there is ${known.join(', ')}` : 'there is none'}`,
  ],
  TP_RUN_AMBIGUOUS: [
    EXIT.input,
    (which: string, found: readonly string[]) =>
      `${found.length} runs begin with ${which}: ${found.join(', ')}; give more of the one you mean, or "all"`,
  ],
  TP_PLACE: [EXIT.input, (flag: string, place: string, why: string) => `${flag} ${place}: ${why}`],
  TP_FAULT_PLACE: [
    EXIT.input,
    (what: string, got: string | number, legal: string) =>
      `no fault can be planted at ${what} ${got}: this run has ${legal}`,
  ],
  // --- comm ---
  TP_MESSAGE_BAD: [EXIT.worker, (from: string, why: string) => `message from ${from} refused: ${why}`],
  TP_PROTOCOL: [
    EXIT.worker,
    (from: string, theirs: string, ours: number) =>
      `${from} speaks protocol ${theirs}, this process ${ours}; install the same tp-run everywhere`,
  ],
  TP_BIND: [
    EXIT.input,
    (endpoint: string, why: string) =>
      `cannot bind ${endpoint}: ${why}; set TMPDIR to a short writable folder`,
  ],
  TP_COLLECTIVE_UNSUPPORTED: [
    EXIT.input,
    (name: string, why: string) => `collective ${name} cannot be used here: ${why}; use auto`,
  ],
  TP_COLLECTIVE_MISMATCH: [
    EXIT.worker,
    (rank: number, ours: string, partner: number, theirs: string) =>
      `ranks are out of step: rank ${rank} is at ${ours}, rank ${partner} at ${theirs}`,
  ],
  TP_COLLECTIVE_TIMEOUT: [
    EXIT.worker,
    (rank: number, op: string, partner: number, ms: number) =>
      `rank ${rank} waited ${ms} ms for rank ${partner} in ${op}`,
  ],
  // --- nodes ---
  TP_LAUNCHER: [EXIT.input, (source: string, why: string) => `ranks from ${source}: ${why}`],
  TP_IFACE: [
    EXIT.input,
    (name: string, why: string, known: readonly string[]) =>
      `--iface ${name}: ${why}; this host has ${listOf(known)}`,
  ],
  TP_KEY: [
    EXIT.input,
    (where: string, why: string) =>
      `the key in ${where} cannot be used: ${why}; "tp-run keygen FILE" makes one, to be copied to every host with mode 0600`,
  ],
  TP_KEY_MISSING: [
    EXIT.input,
    () =>
      'nodes that meet over a network need a key: --key-file FILE or TP_RUN_KEY on each ("tp-run keygen FILE" makes one); ' +
      '--insecure goes without, for a network where everybody is trusted',
  ],
  TP_MASTER_BIND: [
    EXIT.input,
    (endpoint: string, why: string) =>
      `node 0 cannot listen at ${endpoint}: ${why}; --master-addr must be an address of node 0's host, --master-port a free port`,
  ],
  TP_NODE_MISSING: [
    EXIT.worker,
    (missing: readonly number[], endpoint: string, ms: number) =>
      `node ${missing.join(', ')} did not come to ${endpoint} within ${ms} ms; start the same command there with its own ` +
      '--node-rank and the same key, or raise --init-timeout',
  ],
  TP_NODE_MISMATCH: [
    EXIT.input,
    (node: number, what: string, theirs: string, ours: string) =>
      `node ${node} has ${what} ${theirs}, node 0 has ${ours}; start the same command on every host`,
  ],
  TP_NODE_LOST: [EXIT.worker, (who: string, how: string) => `${who}: ${how}`],
  TP_MASTER_SILENT: [
    EXIT.worker,
    (node: number, endpoint: string, ms: number, refusals: number) =>
      `node ${node} got no answer from node 0 at ${endpoint} within ${ms} ms` +
      (refusals > 0
        ? ` (${refusals} connections were refused: does it have the same key?)`
        : '; is it running, and can it be reached?'),
  ],
  TP_NODE_REFUSED: [
    EXIT.worker,
    (node: number, why: string) => `node 0 does not take this process as node ${node}: ${why}`,
  ],
  // --- engine ---
  TP_WORKER_WORDS: [EXIT.input, () => '"worker" is what a launcher starts for each rank; use generate'],
  TP_WORKER_DIED: [EXIT.worker, (who: string, how: string) => `${who}: ${how}`],
  TP_STAGE_TIMEOUT: [
    EXIT.worker,
    (missing: string, stage: string, ms: number) =>
      `${missing} did not get past stage ${stage} within ${ms} ms; see its log, or raise --init-timeout`,
  ],
  TP_STEP_TIMEOUT: [
    EXIT.worker,
    (lagging: string, step: number, ms: number, others: readonly string[]) =>
      `${lagging} holds up the run: no step for ${ms} ms, last completed step ${step}${others.map((o) => `; ${o}`).join('')}`,
  ],
  TP_RANKS_DISAGREE: [
    EXIT.worker,
    (step: number, what: string, values: string) => `step ${step}: ranks disagree on ${what}: ${values}`,
  ],
  TP_INTERRUPTED: [EXIT.interrupted, (signal: string) => `stopped by ${signal}`],
  TP_LOG_DIR: [EXIT.input, (dir: string, why: string) => `cannot write logs to ${dir}: ${why}`],
  // --- native ---
  TP_ADDON_MISSING: [
    EXIT.input,
    (path: string, why: string) => `the native addon ${path} cannot be loaded: ${why}; run "npm run build"`,
  ],
  TP_NATIVE: [EXIT.worker, (where: string, text: string) => `${where}: ${text}`],
  TP_INTERNAL: [EXIT.worker, (text: string) => text],
} as const satisfies Record<string, Row>;

export type ErrorCode = keyof typeof TABLE;
type ValuesOf<C extends ErrorCode> = Parameters<(typeof TABLE)[C][1]>;

export interface RankOf {
  rank: number;
  size: number;
}

/** An error with a code from the table. `message` reads `CODE: text [rank r/size]`. */
export class TpError extends Error {
  override readonly name = 'TpError';
  readonly code: string;
  readonly exitCode: number;
  /** The message without its code and rank. */
  readonly text: string;
  readonly at: RankOf | undefined;

  constructor(code: string, exitCode: number, text: string, at?: RankOf) {
    super(`${code}: ${text}${at ? ` [rank ${at.rank}/${at.size}]` : ''}`);
    this.code = code;
    this.exitCode = exitCode;
    this.text = text;
    this.at = at;
  }

  /** The same error, said by a rank. */
  withRank(at: RankOf): TpError {
    return this.at ? this : new TpError(this.code, this.exitCode, this.text, at);
  }
}

/** Makes the error `code` of the table from its values: `throw fail('TP_SHARD_UNEVEN', 16, 'query heads', 3, [1, 2, 4])`. */
export function fail<C extends ErrorCode>(code: C, ...values: ValuesOf<C>): TpError {
  const [exit, text] = TABLE[code] as unknown as [number, (...v: ValuesOf<C>) => string];
  return new TpError(code, exit, text(...values));
}

/** A value of a file as it stands in messages: JSON, so that control characters are harmless, and cut when long. */
export function shown(value: unknown): string {
  if (value === undefined) return 'nothing';
  const text = JSON.stringify(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}

/** "1, 2, 4 or 8" */
export function listOf(values: readonly (string | number)[]): string {
  if (values.length < 2) return values.join('');
  return `${values.slice(0, -1).join(', ')} or ${values.at(-1)}`;
}
