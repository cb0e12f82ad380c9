// Several hosts in one machine: network namespaces of this test's own, joined by a bridge. Needs root and iproute2.

import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { root } from './fixture.js';
import { Running } from './running.js';

let number = 0;

export class Hosts {
  readonly #names: readonly string[];
  readonly #switch: string;
  readonly #net: string;

  /** Makes `count` hosts with the addresses `address(0)` and so on. */
  constructor(count: number) {
    // one test after the other, several test processes at once: the process id makes names and addresses its own
    const id = `${process.pid}-${number++}`;
    this.#net = `10.${(process.pid >> 8) & 0xff}.${process.pid & 0xff}`;
    this.#switch = `tpt-${id}-s`;
    this.#names = Array.from({ length: count }, (_, i) => `tpt-${id}-${i}`);
    ip('netns', 'add', this.#switch);
    ip('-n', this.#switch, 'link', 'add', 'br0', 'type', 'bridge');
    ip('-n', this.#switch, 'link', 'set', 'br0', 'up');
    for (const [i, name] of this.#names.entries()) {
      ip('netns', 'add', name);
      ip(
        'link',
        'add',
        'eth0',
        'netns',
        name,
        'type',
        'veth',
        'peer',
        'name',
        `p${i}`,
        'netns',
        this.#switch,
      );
      ip('-n', this.#switch, 'link', 'set', `p${i}`, 'master', 'br0', 'up');
      ip('-n', name, 'addr', 'add', `${this.address(i)}/24`, 'dev', 'eth0');
      ip('-n', name, 'link', 'set', 'eth0', 'up');
      ip('-n', name, 'link', 'set', 'lo', 'up');
    }
  }

  address(host: number): string {
    return `${this.#net}.${host + 1}`;
  }

  /** Starts `tp-run ARGS` on a host. */
  start(host: number, args: readonly string[], env: Record<string, string> = {}): Running {
    return new Running(args, env, this.via(host));
  }

  /** The command that runs another one on a host. */
  via(host: number): string[] {
    // unlike `ip netns exec` this leaves /sys as it is, in which Slurm looks for its things
    return ['nsenter', `--net=/run/netns/${this.#names[host]}`];
  }

  /** Pulls or plugs the cable of a host. */
  link(host: number, state: 'up' | 'down'): void {
    ip('-n', this.#switch, 'link', 'set', `p${host}`, state);
  }

  /** Puts a cable that delays every frame by `ms` between hosts 0 and 1; resolves with what takes it away and counts. */
  async slow(ms: number): Promise<() => Promise<number>> {
    const script = (name: string) => join(root, 'test/helpers', name);
    for (const host of [0, 1]) {
      const [file, ...words] = [...this.via(host), 'python3', script('whole-frames.py'), 'eth0'];
      execFileSync(file!, words);
      ip('-n', this.#switch, 'link', 'set', `p${host}`, 'nomaster');
    }
    const words = [
      `--net=/run/netns/${this.#switch}`,
      'python3',
      script('slow-cable.py'),
      'p0',
      'p1',
      `${ms}`,
    ];
    const cable = spawn('nsenter', words, { stdio: ['ignore', 'pipe', 'inherit'] });
    await once(cable.stdout, 'data');
    return async () => {
      const said = once(cable.stdout, 'data');
      cable.kill('SIGTERM');
      const [carried] = await said;
      for (const host of [0, 1]) ip('-n', this.#switch, 'link', 'set', `p${host}`, 'master', 'br0');
      return Number(carried);
    };
  }

  /** TCP sockets that listen on a host: `address:port`. */
  listening(host: number): string[] {
    const table = execFileSync(
      'ip',
      ['netns', 'exec', this.#names[host]!, 'cat', '/proc/net/tcp', '/proc/net/tcp6'],
      {
        encoding: 'utf8',
      },
    );
    return listeners(table);
  }

  remove(): void {
    for (const name of [...this.#names, this.#switch]) ip('netns', 'del', name);
  }
}

/** The listening sockets of /proc/net/tcp: lines `sl local remote state ...`, numbers in hexadecimal, state 0A. */
export function listeners(table: string): string[] {
  return [...table.matchAll(/^\s*\d+: ([0-9A-F]+):([0-9A-F]{4}) \S+ 0A /gm)].map(([, address, port]) => {
    const bytes = address!.match(/../g)!.map((hex) => Number.parseInt(hex, 16));
    const text = bytes.length === 4 ? bytes.reverse().join('.') : address!;
    return `${text}:${Number.parseInt(port!, 16)}`;
  });
}

function ip(...args: string[]): void {
  try {
    execFileSync('ip', args, { stdio: ['ignore', 'pipe', 'pipe'] });
  } catch (error) {
    const { code, stderr } = error as { code?: string; stderr?: Buffer };
    const why = code === 'ENOENT' ? 'there is no ip: apt-get install iproute2' : stderr;
    throw new Error(`ip ${args.join(' ')}: ${why} (these tests need root)`);
  }
}
