// From placement to a run over several nodes: node 0 gathers the others, they serve it.

import { createHash } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { lookup } from 'node:dns/promises';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { hostname, networkInterfaces } from 'node:os';
import { newRunId, rendezvousFolder } from '../comm/bootstrap.js';
import { deriveKeyPair } from '../comm/curve.js';
import { Cluster } from '../engine/cluster.js';
import { follow } from '../engine/follower.js';
import type { NodeFacts } from '../engine/membership.js';
import { interruptible } from '../engine/signals.js';
import { EXIT, fail, TpError } from '../errors.js';
import { log } from '../log.js';
import { packageVersion } from '../report/provenance.js';
import { chooseDevice } from './device.js';
import { requireLogDir } from './folder.js';
import { readKey } from './keys.js';
import { type NamedModel, openModel } from './model.js';
import { environment, type Options } from './options.js';

/**
 * Runs `command` as node 0 of as many nodes as there are, or serves node 0. A command that runs alone is just run.
 * Resolves with the exit code.
 */
export async function withNodes(
  options: Options,
  command: (options: Options) => Promise<number>,
): Promise<number> {
  const { source, node, nodes, meeting, localRank } = options.place;
  if (localRank !== null && options.gpus.count > 1)
    throw fail(
      'TP_LAUNCHER',
      source!,
      `it started a task for every rank, so --gpus ${options.gpus.count} must be 1`,
    );
  if (source !== null)
    log.info(`ranks from ${source}: node ${node} of ${nodes}${localRank === null ? '' : ', one rank'}`);
  if (meeting === null) return command(options);
  const facts = nodeFacts(options, openModel(options.model, options.seed));
  return node === 0 ? lead(options, facts, command) : serve(options, facts);
}

async function lead(
  options: Options,
  facts: NodeFacts,
  command: (options: Options) => Promise<number>,
): Promise<number> {
  const { endpoint, address, secret, remove } = await meetingPlace(options);
  const { nodes } = options.place;
  const keys = secret && {
    own: deriveKeyPair(secret, roleOf(0)),
    clients: Array.from({ length: nodes - 1 }, (_, i) => deriveKeyPair(secret, roleOf(i + 1)).publicKey),
  };
  const place = { nodes, endpoint, address, keys, ...timeouts(options) };
  const where = address === null ? '' : `, sockets at ${address}`;
  log.info(
    `node 0 waits for ${nodes - 1} more at ${endpoint} (${secret || address === null ? 'private' : 'INSECURE'}${where})`,
  );
  let exitCode: number = EXIT.worker;
  try {
    const cluster = await Cluster.listen(place, newRunId(), facts);
    try {
      await interruptible(cluster.allPresent());
      exitCode = await command({ ...options, cluster });
      return exitCode;
    } catch (error) {
      exitCode = error instanceof TpError ? error.exitCode : EXIT.worker;
      throw error;
    } finally {
      await cluster.close(exitCode);
    }
  } finally {
    remove();
  }
}

async function serve(options: Options, facts: NodeFacts): Promise<number> {
  requireLogDir(options.logDir);
  const { endpoint, address, secret } = await meetingPlace(options);
  const { node, nodes } = options.place;
  const { source: model } = openModel(options.model, options.seed);
  const place = {
    node,
    nodes,
    endpoint,
    address,
    keys: secret && {
      own: deriveKeyPair(secret, roleOf(node)),
      server: deriveKeyPair(secret, roleOf(0)).publicKey,
    },
    controls: address === null ? /^ipc:\/\/[\w./-]+\/tp-run-\w{6}\/control$/ : /^tcp:\/\/[\w.:[\]]+:\d+$/,
    model,
    logDir: options.logDir,
    ...timeouts(options),
  };
  return follow(place, facts, { env: workerEnvironment(options) });
}

/** What workers get: with `--iface` also the name under which NCCL looks for it. */
export function workerEnvironment({ iface }: Pick<Options, 'iface'>): NodeJS.ProcessEnv {
  return iface === null ? environment() : { ...environment(), NCCL_SOCKET_IFNAME: iface };
}

const roleOf = (node: number): string => `node ${node}`;

function timeouts({ initTimeout, nodeTimeout }: Options): { initTimeoutMs: number; nodeTimeoutMs: number } {
  return { initTimeoutMs: initTimeout * 1000, nodeTimeoutMs: nodeTimeout * 1000 };
}

interface MeetingPlace {
  endpoint: string;
  /** Of this host, for the sockets of runs; null = ipc. */
  address: string | null;
  /** Null = nobody has to show a key. */
  secret: Buffer | null;
  remove(): void;
}

async function meetingPlace(options: Options): Promise<MeetingPlace> {
  const { meeting, node } = options.place;
  const { initTimeout, iface } = options;
  if (meeting!.kind === 'ipc') {
    const { dir, remove } = await rendezvousFolder(meeting!.name, node === 0, initTimeout * 1000);
    return { endpoint: `ipc://${dir}/nodes`, address: null, secret: null, remove };
  }
  const secret = readKey(options);
  const { host, port } = meeting!;
  const master = await resolve(host, initTimeout * 1000);
  const address = iface === null ? await addressTowards(master, port) : addressOf(iface);
  // node 0 listens where it was said to, and nowhere else
  const endpoint = `tcp://${master.includes(':') ? `[${master}]` : master}:${port}`;
  return { endpoint, address: node === 0 && iface === null ? master : address, secret, remove() {} };
}

/** A name may be published a moment after the process that it names has started. */
async function resolve(host: string, ms: number): Promise<string> {
  const until = performance.now() + ms;
  for (;;) {
    try {
      return (await lookup(host, { family: 4 })).address;
    } catch (error) {
      if (performance.now() > until)
        throw fail('TP_LAUNCHER', 'the flags', `--master-addr ${host}: ${(error as Error).message}`);
      await new Promise((done) => setTimeout(done, 250));
    }
  }
}

/** The address of this host that its packets to `host` leave from; sends nothing. */
async function addressTowards(host: string, port: number): Promise<string> {
  const socket = createSocket('udp4');
  try {
    socket.connect(port, host);
    await once(socket, 'connect');
    return socket.address().address;
  } catch (error) {
    throw fail('TP_LAUNCHER', 'the flags', `there is no way to ${host}: ${(error as Error).message}`);
  } finally {
    socket.close();
  }
}

/** The address of a network interface. TP_IFACE. */
function addressOf(name: string): string {
  const known = networkInterfaces();
  const address = known[name]?.find(({ family }) => family === 'IPv4')?.address;
  if (!address)
    throw fail(
      'TP_IFACE',
      name,
      known[name] ? 'it has no IPv4 address' : 'there is no such interface',
      Object.keys(known),
    );
  return address;
}

function nodeFacts(options: Options, { config, source }: NamedModel): NodeFacts {
  const { device, devices } = chooseDevice(options);
  const seed = source.kind === 'synthetic' ? source.seed : null;
  const model = createHash('sha256')
    .update(JSON.stringify([config, seed]))
    .digest('hex')
    .slice(0, 16);
  const { count } = options.gpus;
  const host = hostname();
  return {
    host,
    // nodes of one machine that are shown different GPUs number them differently: to each other they are other hosts
    hostId: `${host} ${bootId()} ${environment().CUDA_VISIBLE_DEVICES ?? ''}`.slice(0, 256),
    pid: process.pid,
    version: packageVersion(),
    ranks: count,
    device,
    devices: [...devices.slice(0, count)],
    model,
  };
}

function bootId(): string {
  try {
    return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
  } catch {
    return 'unknown';
  }
}
