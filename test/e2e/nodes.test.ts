// Runs over several hosts: network namespaces with cables of their own, CPU workers, CURVE on.

import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { Hosts } from '../helpers/hosts.js';
import { Running, sleep } from '../helpers/running.js';
import { tpRun } from '../helpers/tp-run.js';

const PORT = 29_500;
const folder = mkdtempSync(join(tmpdir(), 'tp-run-test-'));
const key = join(folder, 'key');
const otherKey = join(folder, 'other-key');

let hosts: Hosts;
beforeAll(async () => {
  hosts = new Hosts(3);
  for (const file of [key, otherKey]) expect((await tpRun(['keygen', file])).code).toBe(0);
});
afterAll(() => {
  hosts.remove();
  rmSync(folder, { recursive: true });
});

const started: Running[] = [];
afterEach(async () => {
  for (const run of started) run.signal('SIGKILL');
  for (const run of started.splice(0)) await run.ended;
});

/** The words that make a command node `node` of `nodes`, led by host 0. */
const nodeWords = (node: number, nodes: number, keyFile = key) => [
  ...['--nnodes', `${nodes}`, '--node-rank', `${node}`, '--key-file', keyFile],
  ...['--master-addr', hosts.address(0), '--master-port', `${PORT}`],
];

/** The same command on each host, as many ranks on each as `ranks` says. */
function startAll(ranks: readonly number[], words: readonly string[]): Running[] {
  const runs = ranks.map((count, node) => {
    const more = ['--gpus', `${count}`, '--device', 'cpu', '--threads', '1'];
    return hosts.start(node, [...words, ...more, ...nodeWords(node, ranks.length)]);
  });
  started.push(...runs);
  return runs;
}

const endless = ['--prompt-ids', '2,17,5', '--max-tokens', '4000', '--ignore-eos', '--node-timeout', '2'];

/** Workers of all nodes of a run that decodes. */
async function decoding(runs: readonly Running[]): Promise<number[]> {
  await runs[0]!.decoding();
  return runs.flatMap((run) => run.workers());
}

describe('a run over several hosts', () => {
  it.each([
    ['two', [1, 1]],
    ['three', [2, 1, 1]],
  ])('of %s hosts gives the logits of one rank, byte by byte', async (name, ranks) => {
    const words = ['--prompt-ids', '2,17,5', '--prompt-ids', '9,8,7,6', '--max-tokens', '16'];
    const dump = (file: string) => ['--dump-logits', join(folder, `${name}-${file}`)];
    const runs = startAll(ranks, [...words, ...dump('nodes')]);
    const ended = await Promise.all(runs.map((run) => run.ended));
    expect(
      ended.map(({ code }) => code),
      ended.map(({ stderr }) => stderr).join('\n---\n'),
    ).toEqual(ranks.map(() => 0));
    expect(ended.slice(1).map(({ stdout }) => stdout)).toEqual(ranks.slice(1).map(() => ''));
    const one = await tpRun([...words, ...dump('one'), '--device', 'cpu']);
    expect(one.code).toBe(0);
    expect(ended[0]!.stdout).toBe(one.stdout);
    const [a, b] = ['nodes', 'one'].map((file) => readFileSync(join(folder, `${name}-${file}`)));
    expect(a!.length).toBeGreaterThan(10_000);
    expect(a!.equals(b!)).toBe(true);
  });

  it.each([
    ['two', [1, 1]],
    ['three', [2, 1, 1]],
  ])('of %s hosts passes check', async (_, ranks) => {
    const runs = startAll(ranks, ['check', '--repeats', '1', '--max-tokens', '6']);
    const ended = await Promise.all(runs.map((run) => run.ended));
    const tp = ranks.reduce((sum, n) => sum + n);
    expect(ended[0]!.stdout, ended[0]!.stderr).toMatch(
      new RegExp(`^PASS tp=${tp} is bit-identical to tp=1: .* 0 differing`),
    );
    expect(ended.map(({ code }) => code)).toEqual(ranks.map(() => 0));
  });

  it('listens on the addresses between its hosts alone', async () => {
    const runs = startAll([1, 1], endless);
    await decoding(runs);
    for (const host of [0, 1]) {
      const sockets = hosts.listening(host);
      for (const socket of sockets) expect(socket.startsWith(`${hosts.address(host)}:`), socket).toBe(true);
      // node 0: the meeting, the control channel and its rank's link
      if (host === 0) expect(sockets).toHaveLength(3);
    }
  });

  it('takes its sockets to the interface of --iface, and tells NCCL', async () => {
    const runs = startAll([1, 1], [...endless, '--iface', 'eth0']);
    const workers = await decoding(runs);
    for (const pid of workers)
      expect(readFileSync(`/proc/${pid}/environ`, 'utf8')).toContain('NCCL_SOCKET_IFNAME=eth0');
    const wrong = await hosts.start(2, ['--iface', 'eth7', ...nodeWords(0, 2)]).ended;
    expect(wrong.stderr).toContain(
      'TP_IFACE: --iface eth7: there is no such interface; this host has lo or eth0',
    );
    expect(wrong.code).toBe(2);
  });

  it('hands the key to no worker, neither in words nor in variables', async () => {
    const words = ['--device', 'cpu', '--threads', '1', ...endless];
    const keyless = (node: number) => nodeWords(node, 2).filter((w) => w !== '--key-file' && w !== key);
    const secret = readFileSync(key, 'utf8').trim();
    const runs = [0, 1].map((node) =>
      hosts.start(node, [...words, ...keyless(node)], { TP_RUN_KEY: secret }),
    );
    started.push(...runs);
    for (const pid of await decoding(runs)) {
      const seen =
        readFileSync(`/proc/${pid}/environ`, 'utf8') + readFileSync(`/proc/${pid}/cmdline`, 'utf8');
      expect(seen).not.toContain(secret);
      expect(seen).toContain('worker'); // it looked at the right thing
    }
  });

  it('goes on when ten strangers knock: without a key, with an unknown one, with noise', async () => {
    // longer than strangers need to start and knock
    const words = ['--prompt-ids', '2,17,5', '--max-tokens', '4000', '--ignore-eos'];
    const runs = startAll([1, 1], words);
    await runs[0]!.decoding();
    const stranger = join(folder, 'stranger.mjs');
    writeFileSync(stranger, STRANGER);
    const knock = new Running([], {}, [
      ...hosts.via(2),
      process.execPath,
      stranger,
      ...hosts.listening(0),
      '--',
    ]);
    await runs[0]!.said(/warn: (nodes|ranks): a connection to \S+ was refused: /);
    const { stdout } = await knock.ended;
    expect(stdout).toBe('heard 0\n');
    const [lead] = await Promise.all(runs.map((run) => run.ended));
    expect(lead!.code, lead!.stderr).toBe(0);
    const one = await tpRun([...words, '--device', 'cpu']);
    expect(lead!.stdout).toBe(one.stdout);
  }, 300_000);
});

/** Knocks at every address given: plain sockets, CURVE with keys of its own, plain TCP with noise. Counts what it hears. */
const STRANGER = `
import { createConnection } from 'node:net';
import { createRequire } from 'node:module';
import { randomBytes } from 'node:crypto';
const { Dealer, Pair, curveKeyPair } = createRequire('${import.meta.dirname}/x.js')('zeromq');
const addresses = process.argv.slice(2, process.argv.indexOf('--'));
let heard = 0;
for (const address of addresses) {
  for (const routingId of ['rank-0', 'rank-1', 'node-1']) {
    for (const keys of [{}, curve()]) {
      const socket = new Dealer({ routingId, linger: 0, sendTimeout: 0, receiveTimeout: 2000, ...keys });
      socket.connect('tcp://' + address);
      for (let i = 0; i < 100; i++) socket.send(randomBytes(64)).catch(() => {});
      socket.receive().then(() => heard++, () => {});
    }
  }
  for (let i = 0; i < 50; i++) {
    const noise = createConnection({ host: address.split(':')[0], port: Number(address.split(':')[1]) });
    noise.on('error', () => {}).write(randomBytes(2000));
  }
}
function curve() {
  const { publicKey, secretKey } = curveKeyPair();
  return { curvePublicKey: publicKey, curveSecretKey: secretKey, curveServerKey: curveKeyPair().publicKey };
}
setTimeout(() => { console.log('heard ' + heard); process.exit(); }, 2500);
`;

describe('a node', () => {
  const words = ['--device', 'cpu', '--threads', '1', '--init-timeout', '3', '--prompt-ids', '2,17,5'];

  it('without the key gets nothing, and node 0 says that it was there', async () => {
    const lead = hosts.start(0, [...words, ...nodeWords(0, 2)]);
    const other = hosts.start(1, [...words, ...nodeWords(1, 2, otherKey)]);
    const [first, second] = await Promise.all([lead.ended, other.ended]);
    expect(first.stderr).toMatch(/warn: nodes: a connection to \S+ was refused: /);
    expect(first.stderr).toMatch(/^TP_NODE_MISSING: node 1 did not come to tcp:\S+ within 3000 ms; /m);
    expect(second.stderr).toMatch(
      /^TP_MASTER_SILENT: node 1 got no answer from node 0 at \S+ within 3000 ms \(\d+ connections were refused: /m,
    );
    expect([first.code, second.code]).toEqual([4, 4]);
  });

  it('with a key that the server knows but did not allow is refused by name', async () => {
    const lead = hosts.start(0, [...words, ...nodeWords(0, 2)]);
    // the right secret, but the place of a node that does not exist in this run
    const other = hosts.start(1, [...words, ...nodeWords(2, 3)]);
    const [first, second] = await Promise.all([lead.ended, other.ended]);
    expect(first.stderr).toMatch(/warn: an unknown key was refused: \S{40} from \d/);
    expect([first.code, second.code]).toEqual([4, 4]);
  });

  it('needs a key, or the word --insecure on every side', async () => {
    const keyless = (node: number) => nodeWords(node, 2).filter((w) => w !== '--key-file' && w !== key);
    const refused = await hosts.start(0, [...words, ...keyless(0)]).ended;
    expect(refused.stderr).toContain('TP_KEY_MISSING: nodes that meet over a network need a key');
    expect(refused.code).toBe(2);
    const open = [0, 1].map((node) => hosts.start(node, [...words, ...keyless(node), '--insecure']));
    const ended = await Promise.all(open.map((run) => run.ended));
    expect(ended.map(({ code }) => code)).toEqual([0, 0]);
    expect(ended[0]!.stderr).toContain('INSECURE');
  });

  it('refuses a key that others may read, and one that is none', async () => {
    const loose = join(folder, 'loose');
    writeFileSync(loose, readFileSync(key));
    chmodSync(loose, 0o640);
    const open = await hosts.start(0, [...words, ...nodeWords(0, 2, loose)]).ended;
    expect(open.stderr).toMatch(
      /^TP_KEY: the key in \S+ cannot be used: others may use it \(mode 640\); chmod 600/m,
    );
    writeFileSync(loose, 'not a key');
    chmodSync(loose, 0o600);
    const none = await hosts.start(0, [...words, ...nodeWords(0, 2, loose)]).ended;
    expect(none.stderr).toContain('it is not 64 hexadecimal digits');
    expect([open.code, none.code]).toEqual([2, 2]);
  });

  it.each([
    ['node 0', 0, /node 0 waits/],
    ['another node', 1, /ranks from/],
  ])('that waits for others ends at once when it is interrupted: %s', async (_, node, waits) => {
    const run = hosts.start(node, [
      ...words.filter((w) => w !== '--init-timeout' && w !== '3'),
      ...nodeWords(node, 2),
    ]);
    await run.said(waits);
    const at = performance.now();
    await sleep(500); // it has its handlers by then
    run.signal('SIGINT');
    const { code, stderr } = await run.ended;
    expect(stderr).toMatch(/TP_INTERRUPTED: stopped by SIGINT\n$/);
    expect(code).toBe(130);
    expect(performance.now() - at).toBeLessThan(3500);
  });

  it('with another model ends the run before a rank is started', async () => {
    const lead = hosts.start(0, [...words, ...nodeWords(0, 2)]);
    const other = hosts.start(1, [...words, '--seed', '7', ...nodeWords(1, 2)]);
    const [first, second] = await Promise.all([lead.ended, other.ended]);
    expect(first.stderr).toMatch(/^TP_NODE_MISMATCH: node 1 has another model: \w+, node 0 has \w+; start/m);
    expect(second.stderr).toMatch(/^TP_NODE_REFUSED: node 0 does not take this process as node 1: /m);
    expect([first.code, second.code]).toEqual([2, 4]);
  });
});
