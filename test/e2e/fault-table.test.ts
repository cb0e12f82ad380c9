// Every way that a run can break, tried for real: how soon it is seen, what is said, and that nothing is left. With
// TEST_WRITE=1 it also writes what it saw to docs/faults.md, the table that people read.

import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { Dealer } from 'zeromq';
import { deriveKeyPair } from '../../src/comm/curve.js';
import { encode } from '../../src/comm/messages.js';
import { root } from '../helpers/fixture.js';
import { Hosts } from '../helpers/hosts.js';
import { isAlive, Running, sleep, until } from '../helpers/running.js';
import { tpRun } from '../helpers/tp-run.js';

const folder = mkdtempSync(join(tmpdir(), 'tp-run-test-'));
const key = join(folder, 'key');
const rows: string[][] = [];
let hosts: Hosts;
/** What comes out when nothing happens; a shorter run gives the beginning of it. */
let undisturbed: string[];

const PROMPT = ['--device', 'cpu', '--threads', '1', '--prompt-ids', '2,17,5', '--ignore-eos'];
const ENDLESS = [...PROMPT, '--max-tokens', '4000'];
const nodeWords = (node: number, timeout = 2) => [
  ...['--nnodes', '2', '--node-rank', `${node}`, '--key-file', key, '--node-timeout', `${timeout}`],
  ...['--master-addr', hosts.address(0)],
];

beforeAll(async () => {
  hosts = new Hosts(2);
  await tpRun(['keygen', key]);
  const { stdout } = await tpRun([...PROMPT, '--max-tokens', '400']);
  undisturbed = stdout.trim().split(/\s+/);
  expect(undisturbed).toHaveLength(400);
});
afterAll(() => {
  hosts.remove();
  rmSync(folder, { recursive: true });
  if (process.env.TEST_WRITE !== '1') return;
  mkdirSync(join(root, 'docs'), { recursive: true });
  writeFileSync(join(root, 'docs/faults.md'), page());
});

const started: Running[] = [];
afterEach(async () => {
  for (const run of started) run.signal('SIGCONT');
  for (const run of started) run.signal('SIGKILL');
  for (const run of started.splice(0)) await run.ended;
});
const begin = (run: Running) => {
  started.push(run);
  return run;
};

/** Two ranks on this host. */
const oneHost = (words: readonly string[] = ENDLESS, via: readonly string[] = []) => [
  begin(new Running(['--gpus', '2', ...words], { TMPDIR: folder }, via)),
];
/** A rank on each of two hosts. */
const twoHosts = (words: readonly string[] = ENDLESS, timeout = 2) =>
  [0, 1].map((node) => begin(hosts.start(node, [...words, ...nodeWords(node, timeout)], { TMPDIR: folder })));

interface Fault {
  what: string;
  start(): Running[];
  /** Does it, once tokens come out. */
  act(runs: Running[], workers: number[]): void | Promise<void>;
  /** Whose end counts. */
  witness?: number;
  code: number | null;
  says: RegExp;
  withinMs: number;
}

const kill = (pid: number, signal: NodeJS.Signals) => void process.kill(pid, signal);

const FAULTS: Fault[] = [
  {
    what: 'kill -9 of a rank',
    start: () => oneHost(),
    act: (_, [, rank1]) => kill(rank1!, 'SIGKILL'),
    code: 4,
    says: /^TP_WORKER_DIED: rank 1 on \S+: killed by SIGKILL in generate, last completed step \d+$/m,
    withinMs: 2000,
  },
  {
    what: 'SIGSTOP of a rank (`--step-timeout 1`)',
    start: () => oneHost([...ENDLESS, '--step-timeout', '1']),
    act: (_, [, rank1]) => kill(rank1!, 'SIGSTOP'),
    code: 4,
    says: /^TP_STEP_TIMEOUT: rank 1 on \S+ \(no answer: stopped or stuck\) holds up the run: .*\n[\s\S]*likely cause: rank 1 is stopped/m,
    withinMs: 4000,
  },
  {
    what: 'SIGTERM of a rank',
    start: () => oneHost(),
    act: (_, [rank0]) => kill(rank0!, 'SIGTERM'),
    code: 4,
    says: /^TP_WORKER_DIED: rank 0 on \S+: killed by SIGTERM in generate/m,
    withinMs: 2000,
  },
  {
    what: 'SIGTERM of the launcher',
    start: () => oneHost(),
    act: ([run]) => run!.signal('SIGTERM'),
    code: 130,
    says: /^TP_INTERRUPTED: stopped by SIGTERM$/m,
    withinMs: 1500,
  },
  {
    what: 'kill -9 of the launcher',
    start: () => oneHost(),
    act: ([run]) => run!.signal('SIGKILL'),
    code: null,
    says: /^/,
    withinMs: 1500,
  },
  {
    what: 'SIGSTOP of the launcher for 2 s',
    start: () => oneHost([...PROMPT, '--max-tokens', '400']),
    act: async ([run]) => {
      run!.signal('SIGSTOP');
      await sleep(2000);
      run!.signal('SIGCONT');
    },
    code: 0,
    says: /400 tokens: /,
    withinMs: 15_000,
  },
  {
    what: 'a rank 10 s late',
    start: () => oneHost([...PROMPT, '--max-tokens', '400']),
    act: async (_, [, rank1]) => {
      kill(rank1!, 'SIGSTOP');
      await sleep(10_000);
      kill(rank1!, 'SIGCONT');
    },
    code: 0,
    says: /400 tokens: /,
    withinMs: 25_000,
  },
  {
    what: 'kill -9 of a rank on another host',
    start: () => twoHosts(),
    act: (_, [, rank1]) => kill(rank1!, 'SIGKILL'),
    code: 4,
    says: /^TP_WORKER_DIED: rank 1 on \S+: killed by SIGKILL in generate, last completed step \d+$/m,
    withinMs: 2000,
  },
  {
    what: 'kill -9 of node 1 and its ranks at once',
    start: () => twoHosts(),
    act: ([, node1], [, rank1]) => {
      node1!.signal('SIGKILL');
      kill(rank1!, 'SIGKILL');
    },
    code: 4,
    says: /^TP_NODE_LOST: node 1 on \S+: its connection closed: the process was killed, or its host is down$/m,
    withinMs: 4000,
  },
  {
    what: 'SIGTERM of node 1',
    start: () => twoHosts(),
    act: ([, node1]) => node1!.signal('SIGTERM'),
    code: 4,
    says: /^TP_NODE_LOST: node 1 on \S+: TP_INTERRUPTED: stopped by SIGTERM$/m,
    withinMs: 2500,
  },
  {
    what: 'SIGSTOP of node 1 (`--node-timeout 2`)',
    start: () => twoHosts(),
    act: ([, node1]) => node1!.signal('SIGSTOP'),
    code: 4,
    says: /^TP_NODE_LOST: node 1 on \S+: nothing heard for 2\d\d\d ms: its host, or the network to it, is down$/m,
    withinMs: 5000,
  },
  {
    what: 'kill -9 of node 0, as node 1 sees it',
    start: () => twoHosts(),
    act: ([node0]) => node0!.signal('SIGKILL'),
    witness: 1,
    code: 4,
    says: /^TP_NODE_LOST: node 0: its connection closed: the process was killed, or its host is down$/m,
    withinMs: 4000,
  },
  {
    what: 'the link between hosts goes down (`--node-timeout 2`)',
    start: () => twoHosts(),
    act: () => hosts.link(1, 'down'),
    code: 4,
    says: /^TP_NODE_LOST: node 1 on \S+: nothing heard for 2\d\d\d ms: its host, or the network to it, is down$/m,
    withinMs: 5000,
  },
  {
    what: 'the same, as node 1 sees it',
    start: () => twoHosts(),
    act: () => hosts.link(1, 'down'),
    witness: 1,
    code: 4,
    says: /^TP_NODE_LOST: node 0: nothing heard for 2\d\d\d ms: its host, or the network to it, is down$/m,
    withinMs: 5000,
  },
  {
    what: 'the link is down for 1 s (`--node-timeout 10`)',
    start: () => twoHosts([...PROMPT, '--max-tokens', '100'], 10),
    act: async () => {
      hosts.link(1, 'down');
      await sleep(1000);
      hosts.link(1, 'up');
    },
    code: 0,
    says: /100 tokens: /,
    withinMs: 15_000,
  },
  {
    what: 'the link gets slow: 3 ms a frame',
    start: () => twoHosts([...PROMPT, '--max-tokens', '400'], 10),
    act: async (runs) => {
      const mend = await hosts.slow(3);
      await runs[0]!.ended;
      expect(await mend()).toBeGreaterThan(500); // most of the run came through it
    },
    code: 0,
    says: /400 tokens: /,
    withinMs: 60_000,
  },
  {
    what: '/dev/shm full',
    start: () =>
      oneHost(
        [...PROMPT, '--max-tokens', '40'],
        withMount('/dev/shm', 'size=4k', 'head -c 4096 /dev/zero > /dev/shm/x'),
      ),
    act: () => {},
    code: 0,
    says: /40 tokens: /,
    withinMs: 15_000,
  },
  {
    what: 'no /dev/shm',
    start: () =>
      oneHost(
        [...PROMPT, '--max-tokens', '40'],
        ['unshare', '--mount', 'sh', '-c', 'umount -l /dev/shm; exec "$@"', 'sh'],
      ),
    act: () => {},
    code: 0,
    says: /40 tokens: /,
    withinMs: 15_000,
  },
  {
    what: 'disk full while dumping logits',
    start: () =>
      oneHost(
        [...PROMPT, '--max-tokens', '40', '--dump-logits', `${folder}/full/x.safetensors`],
        withMount(`${folder}/full`, 'size=64k', 'true'),
      ),
    act: () => {},
    code: 2,
    says: /^TP_FILE_UNWRITABLE: \S+ cannot be written: .*/m,
    withinMs: 15_000,
  },
];

/** A command that runs another one where `dir` is a small file system of its own. */
function withMount(dir: string, options: string, before: string): string[] {
  mkdirSync(dir, { recursive: true });
  const script = `mount -t tmpfs -o ${options} none ${dir} && ${before}; exec "$@"`;
  return ['unshare', '--mount', 'sh', '-c', script, 'sh'];
}

const firstLine = (stderr: string): string =>
  /^TP_\w+: .*$/m
    .exec(stderr)?.[0]
    .replaceAll(folder, '…')
    .replace(/\b(on|at) (?:\S+?)(?=[:,; ]|$)/, '$1 HOST') ?? 'goes on';

describe('a fault', () => {
  it.each(FAULTS)('$what', async ({ what, start, act, witness = 0, code, says, withinMs }) => {
    const runs = start();
    try {
      await runs[0]!.decoding().catch(() => {}); // some end before
      const workers = runs.flatMap((run) => run.workers());
      const at = performance.now();
      await act(runs, workers);
      const ended = await runs[witness]!.ended;
      const took = performance.now() - at;
      expect(ended.stderr).toMatch(says);
      expect(ended.code).toBe(code);
      if (code === 0) {
        const tokens = ended.stdout.trim().split(/\s+/);
        expect(tokens).toEqual(undisturbed.slice(0, tokens.length));
      }
      expect(took).toBeLessThan(withinMs);
      hosts.link(1, 'up');
      for (const run of runs) run.signal('SIGCONT');
      await until(
        () => !workers.some(isAlive),
        5000,
        () => `orphans: ${workers.filter(isAlive)}`,
      );
      const seen = code === 0 ? '-' : (took / 1000).toFixed(1);
      const message =
        code === null ? '(none: it is dead; its ranks follow it)' : `\`${firstLine(ended.stderr)}\``;
      rows.push([
        what,
        seen,
        code === null ? 'SIGKILL' : String(code),
        code === 0 ? 'goes on' : message,
        '0',
      ]);
    } finally {
      hosts.link(1, 'up');
    }
  });

  it('a node of another protocol version is told so, and does not join', async () => {
    const secret = Buffer.from(readFileSync(key, 'utf8').trim(), 'hex');
    const lead = begin(hosts.start(0, [...ENDLESS, ...nodeWords(0), '--init-timeout', '4']));
    await lead.said(/node 0 waits/);
    const hello = encode('', { type: 'hello' });
    const other = join(folder, 'other.mjs');
    const own = deriveKeyPair(secret, 'node 1');
    const server = deriveKeyPair(secret, 'node 0').publicKey;
    writeFileSync(other, strangeNode(own, server, `tcp://${hosts.address(0)}:29500`, hello));
    const { stdout } = await begin(new Running([], {}, [...hosts.via(1), process.execPath, other])).ended;
    expect(stdout).toMatch(/node 1 speaks protocol 99, this process \d; install the same tp-run everywhere/);
    const { code, stderr } = await lead.ended;
    expect(stderr).toMatch(/^warn: TP_PROTOCOL: node 1 speaks protocol 99/m);
    expect(stderr).toMatch(/^TP_NODE_MISSING: node 1 did not come/m);
    expect(code).toBe(4);
    rows.push([
      'a node of another protocol version',
      '0.0',
      '4',
      '`TP_PROTOCOL: node 1 speaks protocol 99, …`, said to both',
      '0',
    ]);
  });

  it('a rank of another run is not heard', async () => {
    const [run] = oneHost();
    await run!.decoding();
    const { runs } = JSON.parse((await tpRun(['ps', '--json'], { TMPDIR: folder })).stdout);
    expect(runs).toHaveLength(1);
    const control = readFileSync(`/proc/${run!.workers()[0]}/cmdline`, 'utf8')
      .split('\0')
      .find((w) => w.startsWith('ipc:'));
    const stranger = new Dealer({ routingId: 'rank-x', linger: 0 });
    stranger.connect(control!);
    await stranger.send(encode('another-run', { type: 'stage', stage: 'ready' }));
    await run!.said(/^warn: TP_MESSAGE_BAD: message from "rank-x" refused: no rank of this run$/m);
    stranger.close();
    const before = run!.stdout.length;
    await until(() => run!.stdout.length > before, 10_000); // it goes on
    run!.signal('SIGINT');
    expect((await run!.ended).code).toBe(130);
    rows.push([
      'words of another run, or of no rank',
      '0.0',
      '-',
      '`warn: TP_MESSAGE_BAD: message from "rank-x" refused: …`, goes on',
      '0',
    ]);
  });
});

/** A node whose hello says protocol 99; prints what it hears. */
function strangeNode(
  own: { publicKey: string; secretKey: string },
  server: string,
  endpoint: string,
  hello: Buffer,
): string {
  const bytes = Buffer.from(hello);
  bytes[bytes.indexOf('v') + 1] = 99; // msgpack's own form of a small number
  return `
    import { createRequire } from 'node:module';
    const { Dealer } = createRequire(${JSON.stringify(join(root, 'x.js'))})('zeromq');
    const socket = new Dealer({ routingId: 'node-1', curvePublicKey: ${JSON.stringify(own.publicKey)},
      curveSecretKey: ${JSON.stringify(own.secretKey)}, curveServerKey: ${JSON.stringify(server)} });
    socket.connect(${JSON.stringify(endpoint)});
    await socket.send(Buffer.from('${bytes.toString('hex')}', 'hex'));
    console.log((await socket.receive()).toString('latin1'));
    process.exit();`;
}

function page(): string {
  const head = ['fault', 'seen after, s', 'exit code', 'what is said', 'orphans'];
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  return `# What happens when something breaks

Made by \`TEST_WRITE=1 npx vitest run test/e2e/fault-table.test.ts\`, which CI runs too: real processes, hosts as network namespaces,
2 CPU ranks. "Seen after" is the time to the end of the run, summary and all. Where the run goes on, its tokens are the ones that an
undisturbed run gives.

${[line(head), line(head.map(() => '---')), ...rows.map(line)].join('\n')}

- With \`--max-restarts K\` no sequence is lost: \`test/e2e/recovery.test.ts\` kills ranks at random moments and compares bytes.
- Strangers, wrong keys, floods and garbage: \`test/e2e/nodes.test.ts\`; they are refused and logged, and the run goes on.
- Time-outs count by the monotonic clock, so a jump of the wall clock changes nothing.
- A rank killed by the kernel for lack of memory looks like \`kill -9 of a rank\`; the likely cause names it.
- A peer or a link that NCCL loses ends the run in NCCL's words: several-hosts.md; \`test/comm/nccl.test.ts\` and \`ras.test.ts\` try it on stand-ins.
`;
}
