// A Slurm cluster of two nodes, real daemons in network namespaces of this test's own: munged, slurmctld, two slurmd.

import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Hosts } from './hosts.js';
import { sleep } from './running.js';

const NEEDS = { slurmctld: 'slurm-wlm', slurmd: 'slurm-wlm', srun: 'slurm-wlm', munged: 'munge' };

export class Slurm {
  readonly hosts: Hosts;
  readonly folder: string;
  readonly #daemons: ChildProcess[] = [];

  private constructor() {
    for (const [program, apt] of Object.entries(NEEDS)) requireProgram(program, apt);
    this.folder = mkdtempSync(join(tmpdir(), 'tp-run-test-slurm-'));
    chmodSync(this.folder, 0o755); // munged's socket must be reachable
    this.hosts = new Hosts(2);
  }

  /** Resolves when both nodes are idle. */
  static async start(): Promise<Slurm> {
    const slurm = new Slurm();
    try {
      await slurm.#start();
    } catch (error) {
      await slurm.stop();
      throw error;
    }
    return slurm;
  }

  async #start(): Promise<void> {
    const at = (name: string) => join(this.folder, name);
    writeFileSync(at('munge.key'), randomBytes(128), { mode: 0o600 });
    for (const name of ['state', 'spool-n0', 'spool-n1']) mkdirSync(at(name));
    writeFileSync(at('slurm.conf'), this.#config(at));
    this.#daemon(0, [
      ...['munged', '--foreground', '--force', `--key-file=${at('munge.key')}`],
      ...[`--socket=${at('munge')}`, `--pid-file=${at('munged.pid')}`],
      ...[`--log-file=${at('munged.log')}`, `--seed-file=${at('munged.seed')}`],
    ]);
    await this.#until(() => existsSync(at('munge')));
    this.#daemon(0, ['slurmctld', '-D']);
    for (const host of [0, 1]) this.#daemon(host, ['slurmd', '-D']);
    await this.#until(() => /^\s*2 idle/m.test(this.#ask('sinfo', '--noheader', '--format=%D %t')));
  }

  #config(at: (name: string) => string): string {
    return `ClusterName=test
SlurmctldHost=n0(${this.hosts.address(0)})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=${at('munge')}
CryptoType=crypto/munge
StateSaveLocation=${at('state')}
SlurmdSpoolDir=${at('spool-%n')}
SlurmctldPidFile=${at('slurmctld.pid')}
SlurmdPidFile=${at('slurmd-%n.pid')}
SlurmctldLogFile=${at('slurmctld.log')}
SlurmdLogFile=${at('slurmd-%n.log')}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n0 NodeAddr=${this.hosts.address(0)} CPUs=4 State=UNKNOWN
NodeName=n1 NodeAddr=${this.hosts.address(1)} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
`;
  }

  /** Runs a Slurm command on node n0; its exit code and all that it printed. */
  async run(
    words: readonly string[],
    env: Record<string, string> = {},
  ): Promise<{ code: number | null; stdout: string; stderr: string }> {
    const child = this.#spawn(0, words, env);
    let [stdout, stderr] = ['', ''];
    child.stdout!.setEncoding('utf8').on('data', (text: string) => {
      stdout += text;
    });
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
    });
    const [code] = await once(child, 'close');
    return { code, stdout, stderr };
  }

  async stop(): Promise<void> {
    for (const daemon of this.#daemons.reverse()) {
      if (daemon.exitCode !== null || daemon.signalCode !== null) continue;
      const gone = once(daemon, 'exit');
      daemon.kill('SIGTERM');
      const late = setTimeout(() => daemon.kill('SIGKILL'), 3000);
      await gone;
      clearTimeout(late);
    }
    this.hosts.remove();
    rmSync(this.folder, { recursive: true, force: true });
  }

  #ask(...words: string[]): string {
    const [file, ...args] = [...this.#via(0), ...words];
    try {
      return execFileSync(file!, args, {
        env: this.#env(),
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'ignore'],
      });
    } catch {
      return '';
    }
  }

  #daemon(host: number, words: readonly string[]): void {
    this.#daemons.push(this.#spawn(host, words));
  }

  #spawn(host: number, words: readonly string[], env: Record<string, string> = {}): ChildProcess {
    const [file, ...args] = [...this.#via(host), ...words];
    return spawn(file!, args, { env: { ...this.#env(), ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
  }

  /** A host of that name: Slurm looks its nodes up by the name of the machine. */
  #via(host: number): string[] {
    return [...this.hosts.via(host), 'unshare', '--uts', 'sh', '-c', `hostname n${host} && exec "$@"`, 'sh'];
  }

  #env(): Record<string, string> {
    const clean = Object.entries(process.env).filter(([name]) => !/^(TP_RUN|SLURM)_/.test(name));
    return {
      ...(Object.fromEntries(clean) as Record<string, string>),
      SLURM_CONF: join(this.folder, 'slurm.conf'),
    };
  }

  async #until(condition: () => boolean): Promise<void> {
    const late = performance.now() + 30_000;
    while (!condition()) {
      if (performance.now() > late) throw new Error(`Slurm does not come up: ${this.#logs()}`);
      await sleep(100);
    }
  }

  #logs(): string {
    const names = ['munged.log', 'slurmctld.log', 'slurmd-n0.log', 'slurmd-n1.log'];
    return names
      .map((name) => join(this.folder, name))
      .map((path) => (existsSync(path) ? `\n${path}\n${readFileSync(path, 'utf8').slice(-2000)}` : ''))
      .join('');
  }
}

/** Fails with the package to install. */
export function requireProgram(program: string, apt: string): void {
  try {
    execFileSync('which', [program], { stdio: 'ignore' });
  } catch {
    throw new Error(
      `${program} is not installed, and this test starts the real thing: apt-get install ${apt}`,
    );
  }
}
