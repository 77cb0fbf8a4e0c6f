import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Scanner;
import org.dflib.jjava.jupyter.channels.JupyterConnection;
import org.dflib.jjava.jupyter.kernel.BaseKernel;
import org.dflib.jjava.jupyter.kernel.BaseKernelBuilder;
import org.dflib.jjava.jupyter.kernel.KernelConnectionProperties;
import org.dflib.jjava.jupyter.kernel.LanguageInfo;
import org.dflib.jjava.jupyter.kernel.ReplacementOptions;
import org.dflib.jjava.jupyter.kernel.display.DisplayData;

/** A kernel on JeroMQ, by jjava's library for kernels. Its language: "flood N", "sleep N", "ask PROMPT", "fail"; anything
 * else is its own result. */
public class Jvm extends BaseKernel {
    private volatile Thread worker;

    Jvm(Builder b) {
        super("jvm", "1", b.language(), List.of(), b.history(), b.io(), b.comms(), b.display(), b.magics(), b.registry(),
                false, b.style());
    }

    @Override
    public void interrupt() {
        worker.interrupt();
    }

    @Override
    public Object evalRaw(String code) {
        worker = Thread.currentThread();
        String[] words = code.split(" ", 2);
        switch (words[0]) {
            case "flood":
                for (int i = 0; i < Integer.parseInt(words[1]); i++) {
                    System.out.println(i);
                    System.out.flush();
                }
                return null;
            case "sleep":
                try {
                    Thread.sleep(Long.parseLong(words[1]) * 1000);
                } catch (InterruptedException e) {
                    throw new RuntimeException("interrupted", e);
                }
                return null;
            case "ask":
                System.out.print(words[1]);
                System.out.flush();
                return new Scanner(System.in).nextLine();
            case "fail":
                throw new IllegalStateException("it failed");
            default:
                return code;
        }
    }

    @Override
    public DisplayData inspect(String code, int at, boolean detailed) {
        return null;
    }

    @Override
    public ReplacementOptions complete(String code, int at) {
        return null;
    }

    @Override
    public String isComplete(String code) {
        return IS_COMPLETE_YES;
    }

    static class Builder extends BaseKernelBuilder<Builder, Jvm> {
        LanguageInfo language() { return new LanguageInfo("jvm", "1", "text/plain", ".txt", null, null, null); }
        org.dflib.jjava.jupyter.kernel.history.HistoryManager history() { return buildHistoryManager(); }
        org.dflib.jjava.jupyter.kernel.JupyterIO io() { return buildJupyterIO(java.nio.charset.StandardCharsets.UTF_8); }
        org.dflib.jjava.jupyter.kernel.comm.CommManager comms() { return buildCommManager(); }
        org.dflib.jjava.jupyter.kernel.display.Renderer display() { return buildRenderer(); }
        org.dflib.jjava.jupyter.kernel.magic.MagicParser magics() {
            return new org.dflib.jjava.jupyter.kernel.magic.MagicParser("%", "%%", buildMagicTranspiler());
        }
        org.dflib.jjava.jupyter.kernel.magic.MagicsRegistry registry() { return buildMagicsRegistry(); }
        org.dflib.jjava.jupyter.kernel.util.StringStyler style() { return buildErrorStyler(); }

        @Override
        public Jvm build() { return new Jvm(this); }
    }

    public static void main(String[] args) throws Exception {
        JupyterConnection connection =
                new JupyterConnection(KernelConnectionProperties.parse(Files.readString(Path.of(args[0]))));
        new Builder().build().becomeHandlerForConnection(connection);
        connection.connect();
        connection.waitUntilClose();
    }
}
